"""What an evaluation asks: cells of cases, a case being one document with its questions.

Knows texts; knows nothing of models, arms or scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imprint.adapters.evaluation.scoring import Scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about a document."""

    prompt: str
    """What follows the document, as the model is given it."""
    answers: tuple[str, ...]
    """The right answers: all of them are wanted, or any, as the task's scoring says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One document, read before its questions are known. Its score is the mean over them."""

    name: str
    """Says which document of a cell this is, also in another run."""
    document: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Cases of one kind that are reported together."""

    task: str
    wording: str = ""
    """How needles are written and asked for; empty where there is but one way."""
    length: int | None = None
    """Tokens of document, question and answer together, where they were made to be so long."""
    scoring: Scoring
    max_new_tokens: int
    """Tokens an answer may have."""
    ends_with_line: bool = True
    """Whether an answer ends with its first line; else with eos or when it is full."""
    num_cases: int
    case: Callable[[int], Case]
    """The case of an index below `num_cases`, always the same one. Raises `ValueError`."""

    @property
    def title(self) -> str:
        """Task and wording, for people."""
        plain = self.wording in ("", "ruler")
        return self.task if plain else f"{self.task} ({self.wording})"

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What tells the cells of one run apart."""
        return self.task, self.wording, self.length
