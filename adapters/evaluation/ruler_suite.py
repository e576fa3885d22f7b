"""The cells of `imprint eval ruler`: RULER's tasks at the asked lengths and in the asked wordings.

Scored as RULER scores: by the share of the answers that stand in the response. Beside it stand
stricter scores, for whole numbers, names or words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from imprint.adapters.evaluation.cases import Case, Cell, Question
from imprint.adapters.evaluation.distractors import DistractorTask
from imprint.adapters.evaluation.haystack import Haystack
from imprint.adapters.evaluation.question_files import FileQuestion
from imprint.adapters.evaluation.ruler import TASKS, build_sample
from imprint.adapters.evaluation.scoring import (
    Scoring,
    exact_match,
    exact_variables,
    string_match_all,
    string_match_part,
)
from imprint.adapters.evaluation.squad import answer_f1, words_found
from imprint.adapters.evaluation.tracking import build_tracking
from imprint.adapters.evaluation.wordings import WORDINGS
from imprint.models.tokenizer import Tokenizer

RULER_TASKS: Final = (*TASKS, "vt", "qa")
_NEEDLES = Scoring(metrics={"match": string_match_all, "exact": exact_match})
_TRACKING = Scoring(metrics={"match": string_match_all, "exact": exact_variables})
_QUESTIONS = Scoring(metrics={"match": string_match_part, "words": words_found, "f1": answer_f1})
_NEEDLE_TOKENS, _TRACKING_TOKENS, _QUESTION_TOKENS = 48, 30, 32  # RULER: 128, 30, 32
_SEED_STRIDE = 1_000_003  # so that the documents of neighbouring seeds differ


@dataclass(frozen=True, slots=True, kw_only=True)
class RulerConfig:
    """What is generated. Checked once; the message carries the value."""

    tasks: tuple[str, ...] = ("niah_single", "niah_multikey")
    """Names in `RULER_TASKS`."""
    lengths: tuple[int, ...] = (1024, 2048)
    """Tokens of document, question and answer together, as RULER counts."""
    wordings: tuple[str, ...] = ("ruler",)
    """Names in `WORDINGS`; for needles only."""
    num_documents: int = 200
    """Documents per cell."""
    prompt: Literal["ruler", "question"] = "ruler"
    """`ruler`: the task's question and start of the answer. `question`: the question alone, in
    the checkpoint's question template, as the server asks it."""
    max_new_tokens: int | None = None
    """Tokens an answer may have; None for 48 (needles), 30 (vt) and 32 (qa)."""
    seed: int = 0
    """Chooses documents, keys, values and questions."""

    def __post_init__(self) -> None:
        known = {"tasks": RULER_TASKS, "wordings": tuple(WORDINGS)}
        for name, names in known.items():
            unknown = [value for value in getattr(self, name) if value not in names]
            if unknown:
                raise ValueError(f"{name}: unknown {unknown[0]!r}; known are {', '.join(names)}")
        for name in ("tasks", "wordings", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if self.num_documents < 1:
            raise ValueError(f"num_documents must be at least 1, got {self.num_documents}")

    @property
    def needles(self) -> tuple[str, ...]:
        """The tasks that hide needles in prose."""
        return tuple(task for task in self.tasks if task in TASKS)


class _Sample(Protocol):
    @property
    def document(self) -> str: ...
    @property
    def query(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def answers(self) -> tuple[str, ...]: ...


class RulerSuite:
    """Makes the cells of one configuration."""

    def __init__(
        self,
        config: RulerConfig,
        tokenizer: Tokenizer,
        *,
        haystack: Haystack | None = None,
        questions: Sequence[FileQuestion] = (),
    ) -> None:
        """Needles need a haystack, `qa` needs questions."""
        if config.needles and haystack is None:
            raise ValueError(f"{config.needles[0]} needs a text to hide needles in")
        if "qa" in config.tasks and not questions:
            raise ValueError("qa needs a file of questions; none is bundled")
        self._config, self._tokenizer = config, tokenizer
        self._haystack, self._questions = haystack, questions

    def cells(self) -> list[Cell]:
        """Tasks outermost, then wordings, then lengths."""
        cells: list[Cell] = []
        for task in dict.fromkeys(self._config.tasks):
            if task == "vt":
                cells += [self._tracking(length) for length in self._config.lengths]
            elif task == "qa":
                cells += self._distractors()
            else:
                cells += [
                    self._needles(task, wording, length)
                    for wording in self._config.wordings
                    for length in self._config.lengths
                ]
        return cells

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _case(self, name: str, sample: _Sample) -> Case:
        prompt = sample.query
        if self._config.prompt == "question":
            prompt = self._tokenizer.format_question(sample.question)
        question = Question(prompt=prompt, answers=sample.answers)
        return Case(name=name, document=sample.document, questions=(question,))

    def _answer_tokens(self, default: int) -> int:
        return self._config.max_new_tokens or default

    def _needles(self, task: str, wording: str, length: int) -> Cell:
        haystack = self._haystack
        assert haystack is not None
        num_answer_tokens = self._answer_tokens(_NEEDLE_TOKENS)

        def case(index: int) -> Case:
            seed = self._config.seed * _SEED_STRIDE + index
            sample = build_sample(
                TASKS[task],
                haystack,
                length=length,
                num_tokens=self._num_tokens,
                seed=seed,
                wording=WORDINGS[wording],
                num_answer_tokens=num_answer_tokens,
            )
            return self._case(f"seed {seed}", sample)

        return Cell(
            task=task,
            wording=wording,
            length=length,
            scoring=_NEEDLES,
            max_new_tokens=num_answer_tokens,
            num_cases=self._config.num_documents,
            case=case,
        )

    def _tracking(self, length: int) -> Cell:
        num_answer_tokens = self._answer_tokens(_TRACKING_TOKENS)

        def case(index: int) -> Case:
            seed = self._config.seed * _SEED_STRIDE + index
            sample = build_tracking(
                length=length,
                num_tokens=self._num_tokens,
                seed=seed,
                num_answer_tokens=num_answer_tokens,
            )
            return self._case(f"seed {seed}", sample)

        return Cell(
            task="vt",
            length=length,
            scoring=_TRACKING,
            max_new_tokens=num_answer_tokens,
            num_cases=self._config.num_documents,
            case=case,
        )

    def _distractors(self) -> list[Cell]:
        lengths, num_documents = self._config.lengths, self._config.num_documents
        num_answer_tokens = self._answer_tokens(_QUESTION_TOKENS)
        task = DistractorTask(
            self._questions,
            self._num_tokens,
            shortest=min(lengths),
            num_answer_tokens=num_answer_tokens,
            seed=self._config.seed,
        )
        if len(task.questions) < num_documents:
            raise ValueError(
                f"qa: {len(task.questions)} questions have an answer that stands in their context "
                f"and fit into {min(lengths)} tokens, {num_documents} documents are wanted"
            )

        def cell(length: int) -> Cell:
            return Cell(
                task="qa",
                length=length,
                scoring=_QUESTIONS,
                max_new_tokens=num_answer_tokens,
                num_cases=num_documents,
                case=lambda index: self._case(f"question {index}", task.sample(index, length)),
            )

        return [cell(length) for length in lengths]
