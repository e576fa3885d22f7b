"""LongBench (arXiv 2308.14508) in the files of the published REFINE evaluation, task by task.

A row holds the whole prompt; what a server reads before it knows the question ends where the
instruction is given again, so the prompt is cut there. Rows are read from parquet or JSONL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imprint.adapters.evaluation.cases import Case, Cell, Question
from imprint.adapters.evaluation.extras import require
from imprint.adapters.evaluation.json_lines import is_json_lines, read_json_lines
from imprint.adapters.evaluation.longbench_scoring import (
    class_score,
    edit_similarity,
    first_full_line,
    first_line,
    whole,
)
from imprint.adapters.evaluation.question_files import draw
from imprint.adapters.evaluation.rouge import rouge_l
from imprint.adapters.evaluation.scoring import Scoring, string_match_part
from imprint.adapters.evaluation.squad import answer_f1


@dataclass(frozen=True, slots=True, kw_only=True)
class LongbenchTask:
    """How a task's prompts are cut and its answers scored."""

    question_starts: str
    """The last place of this text in a prompt is where the question begins."""
    scoring: Scoring
    ends_with_line: bool = True
    """Whether nothing behind the first line of a response counts."""


def _answer(starts: str, cut: Callable[[str], str] = first_line) -> LongbenchTask:
    scoring = Scoring(metrics={"f1": answer_f1}, cut=cut)
    return LongbenchTask(question_starts=starts, scoring=scoring)


def _summary(starts: str) -> LongbenchTask:
    scoring = Scoring(metrics={"rouge_l": rouge_l}, cut=whole)
    return LongbenchTask(question_starts=starts, scoring=scoring, ends_with_line=False)


_CODE = LongbenchTask(
    question_starts="Next line of code:",
    scoring=Scoring(metrics={"edit": edit_similarity}, cut=whole),
    ends_with_line=False,
)
_PASSAGES = "\n\nAnswer the question based on the given passages."
_RULER = LongbenchTask(
    question_starts=_PASSAGES, scoring=Scoring(metrics={"match": string_match_part}, cut=first_line)
)
LONGBENCH_TASKS: Final = {
    "narrativeqa": _answer("\n\nNow, answer the question"),
    "qasper": _answer("\n\n Answer the question based on the above article"),
    "multifieldqa_en": _answer("\n\nNow, answer the following question"),
    "hotpotqa": _answer(_PASSAGES),
    "2wikimqa": _answer(_PASSAGES),
    "musique": _answer(_PASSAGES),
    "triviaqa": _answer("\nQuestion:", first_full_line),
    "trec": LongbenchTask(
        question_starts="\nQuestion:",
        scoring=Scoring(metrics={"class": class_score}, cut=first_full_line),
    ),
    "samsum": LongbenchTask(
        question_starts="\nDialogue:",
        scoring=Scoring(metrics={"rouge_l": rouge_l}, cut=first_full_line),
    ),
    "gov_report": _summary("\n\nNow, write a one-page summary"),
    "qmsum": _summary("\n\nNow, answer the query"),
    "multi_news": _summary("\n\nNow, write a one-page summary"),
    "lcc": _CODE,
    "repobench-p": _CODE,
    "ruler_squadqa": _RULER,
    "ruler_hotpotqa": _RULER,
}
"""Tasks by the name in their rows; the two of RULER come in files of the same form."""

_MAX_NEW_TOKENS = 32  # of files that do not say it: RULER's
_COLUMNS = ("prompt", "answers", "answer", "task", "max_gen_tokens")


@dataclass(frozen=True, slots=True)
class _Row:
    case: Case
    max_new_tokens: int


def longbench_cells(
    folder: Path, *, tasks: Sequence[str] = (), num_documents: int | None, seed: int
) -> list[Cell]:
    """A cell for each file of the folder, in the order of their names.

    `tasks` keeps those named; `num_documents` draws that many of each file with the seed. Raises
    `ValueError` for a folder without files, a row or task that cannot be used, `OSError` for what
    cannot be read, MissingExtraError for parquet without pyarrow.
    """
    unknown = [task for task in tasks if task not in LONGBENCH_TASKS]
    if unknown:
        known = ", ".join(LONGBENCH_TASKS)
        raise ValueError(f"tasks: unknown {unknown[0]!r}; known are {known}")
    cells: dict[Any, Cell] = {}
    for path in longbench_files(folder):
        cell = _cell(path, tasks, num_documents, seed)
        if cell is not None:
            if cell.key in cells:
                raise ValueError(f"{path.name}: there is another file of {cell.task}")
            cells[cell.key] = cell
    if not cells:
        raise ValueError(f"{folder} holds no file of {', '.join(tasks)}")
    return list(cells.values())


def longbench_files(folder: Path) -> list[Path]:
    """The files of a folder, by name. Raises `ValueError` if it is none or holds none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(p for p in folder.iterdir() if p.suffix == ".parquet" or is_json_lines(p))
    if not files:
        raise ValueError(f"{folder} holds no .parquet or .jsonl files")
    return files


def _cell(path: Path, tasks: Sequence[str], num_documents: int | None, seed: int) -> Cell | None:
    rows: list[_Row] = []
    names: set[str] = set()
    for where, raw in _read(path):
        name = raw.get("task")
        if name not in LONGBENCH_TASKS:
            raise ValueError(f"{where}: unknown task {name!r}")
        if tasks and name not in tasks:
            return None
        names.add(name)
        rows.append(_row(raw, LONGBENCH_TASKS[name], where, name=f"{path.name} row {len(rows)}"))
    if len(names) != 1:
        raise ValueError(f"{path.name} holds {len(names)} tasks, a file must hold one")
    (name,) = names
    drawn = draw(rows, num_documents, seed)
    return Cell(
        task=name,
        wording=_variant(path, name),
        scoring=LONGBENCH_TASKS[name].scoring,
        max_new_tokens=max(row.max_new_tokens for row in rows),
        ends_with_line=LONGBENCH_TASKS[name].ends_with_line,
        num_cases=len(drawn),
        case=lambda index: drawn[index].case,
    )


def _variant(path: Path, task: str) -> str:
    """What tells several files of a task apart: the rest of the name, of RULER's files."""
    stem = path.name.partition(".")[0]
    return stem.removeprefix(task).strip("_") if task.startswith("ruler_") else ""


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from read_json_lines(path)
        return
    parquet = require("pyarrow.parquet", "reading .parquet")
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        rows = file.read(columns=columns).to_pylist()
    except require("pyarrow", "reading .parquet").ArrowException as error:
        raise ValueError(f"{path.name} is not a parquet file: {error}") from None
    for number, row in enumerate(rows):
        yield f"{path.name} row {number}", row


def _row(raw: dict[str, Any], task: LongbenchTask, where: str, *, name: str) -> _Row:
    prompt = raw.get("prompt")
    answers = raw.get("answers") or raw.get("answer")
    if not isinstance(prompt, str) or not isinstance(answers, list) or not answers:
        raise ValueError(f"{where} needs a text 'prompt' and a list 'answers'")
    document, marker, rest = prompt.rpartition(task.question_starts)
    if not document.strip():
        raise ValueError(f"{where}: the prompt does not repeat {task.question_starts.strip()!r}")
    question = Question(prompt=marker + rest, answers=tuple(str(answer) for answer in answers))
    max_new_tokens = raw.get("max_gen_tokens") or _MAX_NEW_TOKENS
    case = Case(name=name, document=document, questions=(question,))
    return _Row(case, int(max_new_tokens))
