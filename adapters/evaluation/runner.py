"""Run an evaluation: every case of every cell in every arm, scored question by question.

The same documents, prompts and seeds for every arm; no document is dropped and nothing is sampled,
so the same configuration gives the same records, but for their seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from imprint.adapters.errors import AdaptationError
from imprint.adapters.evaluation.answering import GreedyAnswerer
from imprint.adapters.evaluation.arm_names import ARMS
from imprint.adapters.evaluation.arms import ArmAnswers, ArmSetup, CaseArms
from imprint.adapters.evaluation.cases import Case, Cell

Progress = Callable[[Cell, str, int], None]
"""Called as (cell, the arm that runs, cases of the cell that are done)."""
CellKey = tuple[str, str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRecord:
    """One case in one arm; what concerns questions is in their order."""

    predictions: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]
    """By metric."""
    num_adapted: int
    """Questions that were answered with a delta."""
    seconds: float
    token_passes: int
    detail: dict[str, Any] = field(default_factory=dict)

    def mean(self, metric: str) -> float:
        """The case's score."""
        scores = self.scores[metric]
        return sum(scores) / len(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One case in all arms."""

    task: str
    wording: str
    length: int | None
    index: int
    """Of the case within its cell."""
    name: str
    num_tokens: int
    """Tokens of the document."""
    answers: tuple[tuple[str, ...], ...]
    arms: dict[str, ArmRecord]

    @property
    def cell_key(self) -> CellKey:
        """The cell that the record belongs to."""
        return self.task, self.wording, self.length


class Evaluation:
    """One model, some cells, some arms; `run` yields records as they are done."""

    def __init__(
        self,
        setup: ArmSetup,
        cells: Sequence[Cell],
        arms: Sequence[str],
        *,
        seed: int = 0,
        max_new_tokens: int | None = None,
    ) -> None:
        """`max_new_tokens` replaces what the cells say. Raises `ValueError` for an unknown arm."""
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown or not arms:
            wrong = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"arms: unknown {wrong}; known are {', '.join(ARMS)}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.setup, self.cells, self.seed = setup, list(cells), seed
        self.arms = list(dict.fromkeys(arms))
        self._max_new_tokens = max_new_tokens

    def run(
        self,
        done: Collection[tuple[CellKey, int]] = (),
        on_progress: Progress = lambda cell, arm, num_done: None,
    ) -> Iterator[Record]:
        """Every case that is not in `done` (cell key and index), cells in order.

        Raises `ValueError` naming the cell for a case that cannot be made or asked.
        """
        for cell in self.cells:
            answerer = GreedyAnswerer(
                self.setup.model,
                self.setup.tokenizer,
                max_new_tokens=self._max_new_tokens or cell.max_new_tokens,
                ends_with_line=cell.ends_with_line,
            )
            for index in range(cell.num_cases):
                if (cell.key, index) not in done:
                    yield self._run_case(cell, index, answerer, on_progress)
            on_progress(cell, "", cell.num_cases)

    def _run_case(
        self, cell: Cell, index: int, answerer: GreedyAnswerer, on_progress: Progress
    ) -> Record:
        where = f"{cell.title}, document {index}"
        try:
            case = cell.case(index)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        encode = self.setup.tokenizer.encode
        document = encode(case.document)
        prompts = [encode(question.prompt, continues=True) for question in case.questions]
        if not prompts or not all(prompts):
            raise ValueError(f"{where}: a question holds no tokens")
        arms = CaseArms(self.setup, answerer, document, prompts, seed=self.seed + index)
        records = {}
        for arm in self.arms:
            on_progress(cell, arm, index)
            try:
                records[arm] = _score(cell, case, arms.run(arm))
            except AdaptationError as error:
                raise ValueError(f"{where}, arm {arm}: {error}") from error
        return Record(
            task=cell.task,
            wording=cell.wording,
            length=cell.length,
            index=index,
            name=case.name,
            num_tokens=len(document),
            answers=tuple(question.answers for question in case.questions),
            arms=records,
        )


def _score(cell: Cell, case: Case, answers: ArmAnswers) -> ArmRecord:
    scored = [
        cell.scoring.scores(text, question.answers)
        for text, question in zip(answers.texts, case.questions, strict=True)
    ]
    return ArmRecord(
        predictions=answers.texts,
        scores={name: tuple(s[name] for s in scored) for name in cell.scoring.metrics},
        num_adapted=answers.num_adapted,
        seconds=answers.seconds,
        token_passes=answers.token_passes,
        detail=answers.detail,
    )
