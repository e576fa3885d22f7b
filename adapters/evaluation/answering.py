"""The arms of a comparison: how one document's question is answered without and with adaptation.

Every arm reads the document before it knows the question, as the server does. Greedy decoding.
B = rows, T = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.document import DocumentReader
from imprint.adapters.errors import AdaptationError
from imprint.adapters.focus import Focus
from imprint.adapters.refine import Refiner
from imprint.adapters.selection import relevance
from imprint.models.architecture import FastWeightModel
from imprint.models.generate import decode, prefill
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState
from imprint.models.tokenizer import Tokenizer

PASSAGE_TOKENS = 48
"""Length of a retrieved passage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer and what was done for it."""

    text: str
    adapted: bool = False
    """Whether a delta that passed the gate was used."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Numbers of the adaptation, for the report."""


class GreedyAnswerer:
    """Greedy answers of one model; an answer ends with its line, with eos, or when it is full."""

    def __init__(
        self, model: FastWeightModel, tokenizer: Tokenizer, *, max_new_tokens: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._ends_line: dict[int, bool] = {}

    def read(self, documents: Sequence[Sequence[int]]) -> RecurrentState:
        """States after whole documents, one row each."""
        tokens_BT, lengths_B = _pad(documents, self.model.device)
        return prefill(self.model, tokens_BT, lengths_B=lengths_B)[1]

    def answer(
        self,
        queries: Sequence[Sequence[int]],
        state: RecurrentState,
        *,
        delta: LoraDelta | None = None,
    ) -> list[str]:
        """Continue each row of `state` with its query; returns the texts that follow."""
        tokens_BT, lengths_B = _pad(queries, self.model.device)
        logits_BV, state = prefill(self.model, tokens_BT, state, delta=delta, lengths_B=lengths_B)
        answers: list[list[int]] = [[] for _ in queries]
        done = [False] * len(queries)
        for _ in range(self.max_new_tokens):
            tokens_B = logits_BV.argmax(-1)
            for row, token in enumerate(tokens_B.tolist()):
                if not done[row]:
                    done[row] = self._is_end(token, answers[row])
                    if not done[row]:
                        answers[row].append(token)
            if all(done):
                break
            logits_BV, state = decode(self.model, tokens_B, state, delta=delta)
        return [self.tokenizer.decode(ids) for ids in answers]

    def _is_end(self, token: int, so_far: list[int]) -> bool:
        if token == self.tokenizer.eos_id:
            return True
        ends = self._ends_line.get(token)
        if ends is None:
            ends = self._ends_line[token] = "\n" in self.tokenizer.decode([token])
        return ends and bool(self.tokenizer.decode(so_far).strip())


def answer_base(
    answerer: GreedyAnswerer, documents: Sequence[Sequence[int]], queries: Sequence[Sequence[int]]
) -> list[Answer]:
    """Base weights, from the cached state at each document's end; a whole batch at once."""
    return [Answer(text=t) for t in answerer.answer(queries, answerer.read(documents))]


def passage(document: list[int], query: list[int]) -> list[int]:
    """The `PASSAGE_TOKENS` tokens of the document around the place that matches the query best.

    Scored as focus scores positions, so that retrieval and focus look for the same thing.
    """
    score_T = relevance(document, query, window=PASSAGE_TOKENS // 2)
    start = max(int(score_T.argmax()) - PASSAGE_TOKENS // 2, 0)
    return document[start : start + PASSAGE_TOKENS]


def answer_adapted(
    answerer: GreedyAnswerer,
    document: list[int],
    query: list[int],
    config: RefineConfig,
    *,
    seed: int,
    neutral: list[int] | None,
) -> Answer:
    """Adapt without knowing the question, gate on; what the gate rejects is answered by the base.

    A document that cannot be adapted (say, too short) counts as rejected, with its error code.
    """
    refiner = Refiner(answerer.model, document, config, seed=seed, neutral=neutral)
    try:
        for _ in refiner.run():
            pass
    except AdaptationError as error:
        base = answer_base(answerer, [document], [query])[0]
        return Answer(text=base.text, detail={"error": error.code})
    adapter = refiner.adapter
    assert adapter is not None
    text = answerer.answer([query], adapter.state, delta=adapter.delta)[0]
    result = adapter.manifest.get("result", {})
    return Answer(text=text, adapted=adapter.adapted, detail=dict(result))


def answer_focus(
    answerer: GreedyAnswerer,
    document: list[int],
    query: list[int],
    config: RefineConfig,
    *,
    seed: int,
) -> Answer:
    """Read once, then adapt for this question alone."""
    adapter = _read(answerer.model, document, segment_tokens=config.segment_tokens)
    focus = Focus(answerer.model, adapter, [query], config, seed=seed)
    for _ in focus.run():
        pass
    text = answerer.answer([query], adapter.state, delta=focus.delta)[0]
    result = focus.results[0]
    return Answer(text=text, adapted=result.adapted, detail=result.to_dict())


def _read(model: FastWeightModel, document: list[int], *, segment_tokens: int) -> Adapter:
    reader = DocumentReader(model, document, segment_tokens=segment_tokens)
    for _ in reader.run():
        pass
    assert reader.adapter is not None
    return reader.adapter


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [len(row) for row in rows]
    tokens_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row)
    return tokens_BT.to(device), torch.tensor(lengths, device=device)
