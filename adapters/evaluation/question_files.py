"""Questions with their contexts, from a file of the user's: `imprint eval qa`, and RULER's qa.

A line holds `context`, `question` and `answers` (a list of texts, or one text). Knows texts only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from imprint.adapters.evaluation.cases import Case, Cell, Question
from imprint.adapters.evaluation.json_lines import is_json_lines, read_json_lines
from imprint.adapters.evaluation.scoring import Scoring
from imprint.adapters.evaluation.squad import answer_f1, exact_answer

SHORT_ANSWERS = Scoring(metrics={"f1": answer_f1, "exact": exact_answer})
"""Scores of SQuAD."""
SHORT_ANSWER_TOKENS = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileQuestion:
    """One line of a file."""

    context: str
    question: str
    answers: tuple[str, ...]


def read_questions(path: Path) -> list[FileQuestion]:
    """The questions of a `.jsonl` or `.jsonl.zst` file.

    Raises `ValueError` naming the line that lacks something, `OSError` for a file that cannot be
    read.
    """
    questions = [
        FileQuestion(context=field_text(row, "context", where), question=question, answers=answers)
        for where, row, question, answers in read_asked(path)
    ]
    if not questions:
        raise ValueError(f"{path.name} holds no questions")
    return questions


def read_asked(path: Path) -> Iterable[tuple[str, dict[str, Any], str, tuple[str, ...]]]:
    """Place, row, question and answers of every line."""
    if not is_json_lines(path):
        raise ValueError(f"a file of questions must be .jsonl or .jsonl.zst, got {path.name}")
    for where, row in read_json_lines(path):
        yield where, row, field_text(row, "question", where), _answers(row, where)


def field_text(row: dict[str, Any], name: str, where: str) -> str:
    """A text of a row that is not blank. Raises `ValueError` naming it."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} needs a text {name!r}, got {value!r:.60}")
    return value


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("answers")
    answers = [value] if isinstance(value, str) else value
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        raise ValueError(f"{where} needs 'answers', a list of texts, got {value!r:.60}")
    return tuple(answers)


def question_cell(
    questions: Sequence[FileQuestion],
    format_question: Callable[[str], str],
    *,
    num_documents: int | None,
    seed: int,
) -> Cell:
    """Every context a document with all its questions, or `num_documents` drawn with the seed."""
    by_context: dict[str, list[FileQuestion]] = {}
    for question in questions:
        by_context.setdefault(question.context, []).append(question)
    contexts = draw(list(by_context), num_documents, seed)

    def case(index: int) -> Case:
        context = contexts[index]
        return Case(
            name=f"context {index}",
            document=context,
            questions=tuple(
                Question(prompt=format_question(asked.question), answers=asked.answers)
                for asked in by_context[context]
            ),
        )

    return Cell(
        task="qa",
        scoring=SHORT_ANSWERS,
        max_new_tokens=SHORT_ANSWER_TOKENS,
        num_cases=len(contexts),
        case=case,
    )


def draw(items: list[T], num: int | None, seed: int) -> list[T]:
    """`num` of the items drawn with the seed, in their order; all of them if that is all."""
    if num is None or num >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(f"draw:{seed}").sample(range(len(items)), num))]
