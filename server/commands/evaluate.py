"""`imprint eval ruler`: needle tasks, base against adapted answers, document by document."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imprint.adapters.config import RefineConfig
from imprint.server.commands.common import (
    UsageError,
    add_model,
    error_console,
    model_folder,
    read_fields,
    write_json,
)
from imprint.server.config import BUNDLED_MODEL

if TYPE_CHECKING:
    from imprint.adapters.evaluation.runner import Cell, Evaluation
    from imprint.models.architecture import FastWeightModel
    from imprint.models.tokenizer import Tokenizer

_HELD_OUT = BUNDLED_MODEL / "heldout.txt"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command and its one benchmark."""
    parser = commands.add_parser("eval", help="measure a model, base against adapted")
    benchmarks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    ruler = benchmarks.add_parser(
        "ruler",
        help="needles in prose, after RULER",
        description=(
            "Hide needles in prose, let the model read each document before it knows the question, "
            "and compare answers with and without adaptation. Greedy decoding, every document "
            "scored, the same documents for every arm."
        ),
    )
    _add_what(ruler)
    _add_how(ruler)
    ruler.set_defaults(run=run)


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add(
        "--haystack",
        type=Path,
        metavar="FILE",
        help="prose: .txt, or .jsonl[.zst] with a field `text`; default: heldout.txt, "
        "which the bundled model was not trained on",
    )
    add(
        "--tasks",
        type=names,
        default=("niah_single", "niah_multikey"),
        metavar="LIST",
        help="niah_single, niah_multikey, niah_multivalue, niah_multiquery; with commas",
    )
    add("--lengths", type=integers, default=(1024, 2048), metavar="LIST", help="tokens; 1024,2048")
    add(
        "--wordings",
        type=names,
        default=("ruler",),
        metavar="LIST",
        help="names of wordings, or the groups training and heldout; default: ruler",
    )
    add("--num-documents", type=int, default=200, metavar="N", help="documents per cell")
    add(
        "--prompt",
        choices=("ruler", "question"),
        default="ruler",
        help="ruler: question and start of the answer; question: as the server asks it",
    )
    add(
        "--question-template",
        type=Path,
        metavar="FILE",
        help="template of --prompt question; default: the checkpoint's",
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--arms",
        type=names,
        default=("base", "adapted", "focus"),
        metavar="LIST",
        help=(
            "base: cached state; reread: read twice; retrieval: best passage only; adapted: "
            "studied without the question; focus: with it. Default: base,adapted,focus"
        ),
    )
    for prefix, arm, default in (("", "adapted", "default"), ("focus-", "focus", "focus")):
        add(f"--{prefix}preset", default=default, help=f"preset of arm {arm}; default: {default}")
        add(
            f"--{prefix}set",
            action="append",
            default=[],
            dest=f"{prefix}overrides".replace("-", "_"),
            metavar="FIELD=VALUE",
            help="override one field of that preset; may be given several times",
        )
    add("--seed", type=int, default=0, metavar="N", help="chooses documents and random numbers")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="documents at once where nothing is adapted",
    )
    add("--max-tokens", type=int, default=48, metavar="N", help="longest answer, in tokens")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch")
    add("--json", action="store_true", help="print the report as JSON")
    add("--predictions", type=Path, metavar="FILE", help="write every answer as a line of JSON")


def names(text: str) -> tuple[str, ...]:
    """`a,b` as a tuple."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def integers(text: str) -> tuple[int, ...]:
    """`1,2` as a tuple of numbers; `ValueError` for anything else."""
    return tuple(int(name) for name in names(text))


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the report goes to standard output, progress to standard error."""
    if arguments.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {arguments.threads}")
    from imprint.adapters.evaluation.report import render, summarize

    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = error_console()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        evaluation = _prepare(arguments, progress)
        cells = _run_cells(evaluation, arguments.predictions)
    summaries = [summarize(cell, seed=arguments.seed) for cell in cells]
    if arguments.json:
        write_json(
            {
                "benchmark": "ruler",
                "command": sys.argv[1:],
                "model": str(arguments.model),
                "config": asdict(evaluation.config),
                "refine": evaluation.refine.to_dict(),
                "focus": evaluation.focus.to_dict(),
                "threads": arguments.threads,
                "seconds": time.perf_counter() - started,
                "cells": summaries,
            }
        )
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(render(summaries))
    return 0


def _prepare(arguments: argparse.Namespace, progress: Progress) -> Evaluation:
    """Everything loaded and checked. Raises `UsageError` for what cannot be used."""
    import torch

    from imprint.adapters.evaluation.haystack import Haystack
    from imprint.adapters.evaluation.runner import Evaluation, EvaluationConfig
    from imprint.adapters.evaluation.wordings import HELD_OUT, TRAINING

    torch.set_num_threads(arguments.threads)
    groups = {"training": TRAINING, "heldout": HELD_OUT}
    wordings = [
        name
        for given in arguments.wordings
        for name in ([w.name for w in groups[given]] if given in groups else [given])
    ]
    refine = RefineConfig.from_dict(read_fields(arguments.preset, arguments.overrides))
    focus = RefineConfig.from_dict(
        read_fields(arguments.focus_preset, arguments.focus_overrides, flag="--focus-set")
    )
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done)

    path = arguments.haystack or _HELD_OUT
    try:
        config = EvaluationConfig(
            tasks=arguments.tasks,
            lengths=arguments.lengths,
            wordings=tuple(wordings),
            arms=arguments.arms,
            num_documents=arguments.num_documents,
            prompt=arguments.prompt,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_tokens,
            seed=arguments.seed,
        )
        haystack = Haystack.from_file(path)
    except OSError as error:
        raise UsageError(f"--haystack: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    model, tokenizer, neutral = _load(arguments)
    return Evaluation(
        model, tokenizer, haystack, config, refine, focus, neutral=neutral, on_progress=show
    )


def _load(arguments: argparse.Namespace) -> tuple[FastWeightModel, Tokenizer, list[int] | None]:
    """The model, its tokenizer, and its neutral text if it has one."""
    from imprint.adapters.gate import load_neutral
    from imprint.models.checkpoint import load_model
    from imprint.models.tokenizer import load_tokenizer

    if arguments.question_template is not None and arguments.prompt != "question":
        raise UsageError("--question-template goes with --prompt question")
    folder = model_folder(arguments.model, arguments.revision).folder
    tokenizer = load_tokenizer(folder, question_template=arguments.question_template)
    return load_model(folder), tokenizer, load_neutral(folder, tokenizer)


def _run_cells(evaluation: Evaluation, predictions: Path | None) -> list[Cell]:
    """Run all cells, writing answers as they come."""
    try:
        if predictions is None:
            return list(evaluation.run())
        with predictions.open("w", encoding="utf-8") as file:
            cells = []
            for cell in evaluation.run():
                _write_predictions(cell, file)
                cells.append(cell)
            return cells
    except ValueError as error:  # a length too short for its task
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"--predictions: {predictions}: {error.strerror or error}") from error


def _write_predictions(cell: Cell, file: TextIO) -> None:
    where = {"task": cell.task, "wording": cell.wording, "length": cell.length}
    for arm, answers in cell.arms.items():
        for answer in answers:
            record = {**where, "arm": arm, **asdict(answer)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
