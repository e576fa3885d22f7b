"""Run an evaluation: the same documents, questions and seeds for every arm, scored one by one.

A cell is one (task, wording, length). No document is dropped; nothing is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from imprint.adapters.config import RefineConfig
from imprint.adapters.evaluation.answering import (
    Answer,
    GreedyAnswerer,
    answer_adapted,
    answer_base,
    answer_focus,
    passage,
)
from imprint.adapters.evaluation.haystack import Haystack
from imprint.adapters.evaluation.ruler import TASKS, NeedleSample, build_sample
from imprint.adapters.evaluation.scoring import exact_match, string_match_all
from imprint.adapters.evaluation.wordings import WORDINGS
from imprint.models.architecture import FastWeightModel
from imprint.models.tokenizer import Tokenizer

ARMS = ("base", "reread", "retrieval", "adapted", "focus")
"""Ways to answer, all but `base` compared with it. Without adaptation: `base` from the state after
one reading, `reread` after two, `retrieval` from the best passage alone. `adapted` has studied the
document without the question, `focus` with it."""
_BATCHED_ARMS = ARMS[:3]
Progress = Callable[[str, int, int], None]
"""Called as (what runs, documents done, documents in all)."""
_BATCH_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated. Checked once; the message carries the value."""

    tasks: tuple[str, ...] = ("niah_single", "niah_multikey")
    """Names in `TASKS`."""
    lengths: tuple[int, ...] = (1024, 2048)
    """Tokens of document, question and answer together, as RULER counts."""
    wordings: tuple[str, ...] = ("ruler",)
    """Names in `WORDINGS`."""
    arms: tuple[str, ...] = ("base", "adapted", "focus")
    """Names in `ARMS`."""
    num_documents: int = 200
    """Documents per cell."""
    prompt: Literal["ruler", "question"] = "ruler"
    """`ruler`: the wording's question and start of the answer. `question`: the question alone, in
    the checkpoint's question template, as the server asks it."""
    batch_size: int = 16
    """Documents read at once by the arms that do not adapt."""
    max_new_tokens: int = 48
    """Tokens an answer may have. RULER allows 128; fewer can only lower a score."""
    seed: int = 0
    """Chooses documents, keys, values and the adaptations' random numbers."""

    def __post_init__(self) -> None:
        known = {"tasks": tuple(TASKS), "wordings": tuple(WORDINGS), "arms": ARMS}
        for name, names in known.items():
            unknown = [value for value in getattr(self, name) if value not in names]
            if unknown:
                raise ValueError(f"{name}: unknown {unknown[0]!r}; known are {', '.join(names)}")
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        for name in ("num_documents", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lengths:
            raise ValueError("lengths is empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """One document in one arm."""

    document: int
    """Index within the cell."""
    num_tokens: int
    """Tokens of the document."""
    answers: tuple[str, ...]
    prediction: str
    exact: float
    string_match_all: float
    seconds: float
    """Reading, adapting and answering; in a batch, the batch's time shared equally."""
    adapted: bool
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All answers of one (task, wording, length), by arm."""

    task: str
    wording: str
    length: int
    arms: dict[str, tuple[ScoredAnswer, ...]]


@dataclass(frozen=True, slots=True)
class _Item:
    """A sample as the model sees it."""

    sample: NeedleSample
    document: list[int]
    query: list[int]


class Evaluation:
    """One model under one configuration; `run` yields cells as they are done."""

    def __init__(
        self,
        model: FastWeightModel,
        tokenizer: Tokenizer,
        haystack: Haystack,
        config: EvaluationConfig,
        refine: RefineConfig,
        focus: RefineConfig,
        *,
        neutral: list[int] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.haystack = haystack
        self.config = config
        self.refine = refine
        self.focus = focus
        self.neutral = neutral
        self.answerer = GreedyAnswerer(model, tokenizer, max_new_tokens=config.max_new_tokens)
        self._on_progress = on_progress or (lambda what, done, total: None)

    def run(self) -> Iterator[Cell]:
        """Every cell, tasks outermost. Raises `ValueError` for a length too short for its task."""
        for task in self.config.tasks:
            for wording in self.config.wordings:
                for length in self.config.lengths:
                    items = self._items(task, wording, length)
                    arms = {}
                    for arm in self.config.arms:
                        label = f"{task} {wording} {length} {arm}"
                        arms[arm] = tuple(self._run_arm(arm, items, label))
                    yield Cell(task=task, wording=wording, length=length, arms=arms)

    def _items(self, task: str, wording: str, length: int) -> list[_Item]:
        items = []
        for index in range(self.config.num_documents):
            sample = build_sample(
                TASKS[task],
                self.haystack,
                length=length,
                num_tokens=self._num_tokens,
                seed=self.config.seed * 1_000_003 + index,
                wording=WORDINGS[wording],
                num_answer_tokens=self.config.max_new_tokens,
            )
            query = sample.query
            if self.config.prompt == "question":
                query = self.tokenizer.format_question(sample.question)
            encode = self.tokenizer.encode
            items.append(_Item(sample, encode(sample.document), encode(query, continues=True)))
        return items

    def _num_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _run_arm(self, arm: str, items: list[_Item], label: str) -> Iterator[ScoredAnswer]:
        longest = max(len(item.document) for item in items)
        size = min(self.config.batch_size, max(1, _BATCH_TOKENS // longest))
        size = size if arm in _BATCHED_ARMS else 1
        for start in range(0, len(items), size):
            self._on_progress(label, start, len(items))
            batch = items[start : start + size]
            begin = time.perf_counter()
            answers = self._answer(arm, batch, start)
            seconds = (time.perf_counter() - begin) / len(batch)
            for offset, (item, answer) in enumerate(zip(batch, answers, strict=True)):
                yield _score(start + offset, item, answer, seconds)
        self._on_progress(label, len(items), len(items))

    def _answer(self, arm: str, batch: list[_Item], index: int) -> list[Answer]:
        if arm in _BATCHED_ARMS:
            documents = [_text_for(arm, item) for item in batch]
            return answer_base(self.answerer, documents, [item.query for item in batch])
        item, seed = batch[0], self.config.seed + index
        if arm == "focus":
            answer = answer_focus(self.answerer, item.document, item.query, self.focus, seed=seed)
        else:
            answer = answer_adapted(
                self.answerer,
                item.document,
                item.query,
                self.refine,
                seed=seed,
                neutral=self.neutral,
            )
        return [answer]


def _text_for(arm: str, item: _Item) -> list[int]:
    """What an arm without adaptation reads before the question."""
    if arm == "reread":
        return item.document * 2
    return passage(item.document, item.query) if arm == "retrieval" else item.document


def _score(index: int, item: _Item, answer: Answer, seconds: float) -> ScoredAnswer:
    return ScoredAnswer(
        document=index,
        num_tokens=len(item.document),
        answers=item.sample.answers,
        prediction=answer.text,
        exact=exact_match(answer.text, item.sample.answers),
        string_match_all=string_match_all(answer.text, item.sample.answers),
        seconds=seconds,
        adapted=answer.adapted,
        detail=answer.detail,
    )
