"""A folder of the user's own documents, with questions beside them or with recall probes.

`report.txt` is asked what `report.questions.jsonl` holds, lines of `question` and `answers`. A
document without such a file is asked for what follows a few of its own words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from imprint.adapters.evaluation.cases import Case, Cell, Question
from imprint.adapters.evaluation.question_files import (
    SHORT_ANSWER_TOKENS,
    SHORT_ANSWERS,
    draw,
    read_asked,
)
from imprint.adapters.evaluation.scoring import Scoring
from imprint.adapters.evaluation.squad import answer_f1

SUFFIXES = (".txt", ".md")
NUM_PROBES = 8
"""Recall probes of a document."""
_CUE_WORDS, _ASKED_WORDS = 8, 5
_RECALL_TOKENS = 24
_WORD = re.compile(r"\S+")


def words_recalled(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answer's words that the prediction has at the same places; the best answer's."""
    given = prediction.split()

    def share(answer: str) -> float:
        wanted = answer.split()
        pairs = zip(given, wanted, strict=False)
        return sum(ours == theirs for ours, theirs in pairs) / len(wanted)

    return max(share(answer) for answer in answers)


_RECALL = Scoring(metrics={"recall": words_recalled, "f1": answer_f1})


def document_cells(
    folder: Path,
    format_question: Callable[[str], str],
    *,
    num_documents: int | None,
    seed: int,
) -> list[Cell]:
    """Two cells: documents with questions, and documents with recall probes; empty ones left out.

    Looks into subfolders as well. Raises `ValueError` for a folder without documents, a file that
    cannot be used, or questions without a document; `OSError` for what cannot be read.
    """
    files = [path for path in document_files(folder) if path.suffix in SUFFIXES]
    asked, probed = [], []
    for path in draw(files, num_documents, seed):
        name, text = str(path.relative_to(folder)), _read(path)
        if questions_of(path).is_file():
            asked.append(_asked(name, text, questions_of(path), format_question))
        else:
            probed.append(_probed(name, text, seed))
    return [
        *_cell("documents", asked, SHORT_ANSWERS, SHORT_ANSWER_TOKENS, ends_with_line=True),
        *_cell("recall", probed, _RECALL, _RECALL_TOKENS, ends_with_line=False),
    ]


def document_files(folder: Path) -> list[Path]:
    """The documents of a folder and the questions beside them, by name.

    Raises `ValueError` for no folder, one without documents, or questions without a document.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    documents = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if not documents:
        raise ValueError(f"{folder} holds no {' or '.join(SUFFIXES)} files")
    beside = {questions_of(path) for path in documents}
    questions = sorted(folder.rglob("*.questions.jsonl"))
    for path in questions:
        if path not in beside:
            raise ValueError(f"{path.name} has no document beside it")
    return [*documents, *questions]


def questions_of(path: Path) -> Path:
    """Where the questions of a document are looked for."""
    return path.with_suffix(".questions.jsonl")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path.name} is empty")
    return text


def _asked(name: str, text: str, path: Path, format_question: Callable[[str], str]) -> Case:
    questions = tuple(
        Question(prompt=format_question(question), answers=answers)
        for _, _, question, answers in read_asked(path)
    )
    if not questions:
        raise ValueError(f"{path.name} holds no questions")
    return Case(name=name, document=text, questions=questions)


def _probed(name: str, text: str, seed: int) -> Case:
    """Up to `NUM_PROBES` places, one in each equal part of the document, drawn with the seed."""
    words = [match.span() for match in _WORD.finditer(text)]
    rng = random.Random(f"recall:{seed}:{name}")
    last = len(words) - _ASKED_WORDS  # the last word before which a cue may end
    num = min(NUM_PROBES, (last - _CUE_WORDS + 1) // (_CUE_WORDS + _ASKED_WORDS) or 1)
    if last < _CUE_WORDS:
        need = _CUE_WORDS + _ASKED_WORDS
        raise ValueError(f"{name} has {len(words)} words, a recall probe needs {need}")
    questions = []
    for i in range(num):
        room = last - _CUE_WORDS + 1
        place = _CUE_WORDS + rng.randrange(room * i // num, room * (i + 1) // num)
        cue = text[words[place - _CUE_WORDS][0] : words[place - 1][1]]
        asked = text[words[place][0] : words[place + _ASKED_WORDS - 1][1]]
        questions.append(Question(prompt=f"\n{cue}", answers=(asked,)))
    return Case(name=name, document=text, questions=tuple(questions))


def _cell(
    task: str, cases: Sequence[Case], scoring: Scoring, tokens: int, *, ends_with_line: bool
) -> list[Cell]:
    if not cases:
        return []
    return [
        Cell(
            task=task,
            scoring=scoring,
            max_new_tokens=tokens,
            ends_with_line=ends_with_line,
            num_cases=len(cases),
            case=lambda index: cases[index],
        )
    ]
