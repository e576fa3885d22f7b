"""Greedy answers from a recurrent state, and what they cost in tokens.

Knows models and tokens; knows nothing of arms, tasks or scores. B = rows, T = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.adapters.drafts import LineEnd
from imprint.models.architecture import FastWeightModel
from imprint.models.generate import decode, prefill
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState
from imprint.models.tokenizer import Tokenizer

_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Texts in the order of the questions, and the tokens passed through the model for them."""

    texts: tuple[str, ...]
    token_passes: int


class GreedyAnswerer:
    """Greedy answers of one model. They end with eos, when they are full, or with their line."""

    def __init__(
        self,
        model: FastWeightModel,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        ends_with_line: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.ends_with_line = ends_with_line
        self._line_end = LineEnd(tokenizer)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        state: RecurrentState,
        *,
        delta: LoraDelta | None = None,
        model: FastWeightModel | None = None,
    ) -> Answers:
        """Answer every prompt from `state`, which has one row for all or a row a prompt.

        So has `delta`. A prompt holds one token or more. `model`: one with other weights.
        """
        texts: list[str] = []
        token_passes = 0
        for first in range(0, len(prompts), _ROWS_AT_ONCE):
            part = prompts[first : first + _ROWS_AT_ONCE]
            last = first + len(part)
            own = delta if delta is None or delta.num == 1 else delta.slice(first, last)
            shared = state.batch_size == 1
            rows = state.fork(len(part)) if shared else state.slice(first, last)
            for tokens in self._answer(model or self.model, part, rows, own):
                texts.append(self.tokenizer.decode(tokens))
                token_passes += len(tokens)
        return Answers(
            texts=tuple(texts), token_passes=token_passes + sum(len(prompt) for prompt in prompts)
        )

    def _answer(
        self,
        model: FastWeightModel,
        prompts: Sequence[Sequence[int]],
        state: RecurrentState,
        delta: LoraDelta | None,
    ) -> list[list[int]]:
        tokens_BT, lengths_B = padded(prompts, model.device)
        logits_BV, state = prefill(model, tokens_BT, state, delta=delta, lengths_B=lengths_B)
        answers: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for _ in range(self.max_new_tokens):
            tokens_B = logits_BV.argmax(-1)
            for row, token in enumerate(tokens_B.tolist()):
                if not done[row]:
                    done[row] = self._is_end(token, answers[row])
                    if not done[row]:
                        answers[row].append(token)
            if all(done):
                break
            logits_BV, state = decode(model, tokens_B, state, delta=delta)
        return answers

    def _is_end(self, token: int, so_far: list[int]) -> bool:
        if not self.ends_with_line:
            return token == self.tokenizer.eos_id
        return self._line_end(token, so_far)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of one token or more as one tensor [B, T], and their lengths [B]."""
    lengths = [len(row) for row in rows]
    tokens_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row)
    return tokens_BT.to(device), torch.tensor(lengths, device=device)
