"""Runs one evaluation for `imprint eval`: loads, checks, shows progress, keeps, reports.

Knows files and terminals; what is asked and how it is scored is in `imprint.adapters.evaluation`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imprint import __version__
from imprint.adapters.config import RefineConfig, config_of_focus, config_of_study
from imprint.server.commands.common import (
    CommandError,
    UsageError,
    check_device,
    error_console,
    model_folder,
    read_fields,
    write_json,
)

if TYPE_CHECKING:
    from imprint.adapters.evaluation.arms import ArmSetup
    from imprint.adapters.evaluation.cases import Cell
    from imprint.adapters.evaluation.results import ResultFolder
    from imprint.adapters.evaluation.runner import Evaluation, Record
    from imprint.models.tokenizer import Tokenizer

R = TypeVar("R")

INTERRUPTED = 130
"""Exit code of a run that was interrupted."""
_TABLE_WIDTH = 176


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a benchmark asks."""

    cells: Sequence[Cell]
    config: Mapping[str, Any]
    """What decides the cells, as plain values."""
    inputs: Mapping[str, str]
    """sha256 of every file they were made from."""


Source = Callable[[argparse.Namespace, "Tokenizer"], Material]
"""Makes the material of a benchmark. May raise `ValueError`, `OSError` and UsageError."""


def run_benchmark(arguments: argparse.Namespace) -> int:
    """Evaluate; the report goes to standard output, progress to standard error.

    An interruption reports what is done by then, with exit code 130.
    """
    started = time.perf_counter()
    run = prepare_or_explain(arguments, arguments.plot, partial(_single, arguments))
    interrupted = run.finish()
    summaries = run.summarize()
    report = {
        "benchmark": arguments.benchmark,
        "command": sys.argv[1:],
        "model": str(arguments.model),
        "config": run.config,
        "threads": arguments.threads,
        "seconds": time.perf_counter() - started,
        "interrupted": interrupted,
        "cells": summaries,
    }
    if not summaries:
        raise KeyboardInterrupt
    draw_or_explain(summaries, arguments.plot)
    _show(report, as_json=arguments.json)
    if interrupted:
        _say_interrupted(run)
    return INTERRUPTED if interrupted else 0


def _single(arguments: argparse.Namespace, prepared: Prepared) -> EvaluationRun:
    refine = config_of_study(read_fields(arguments.preset, arguments.overrides))
    focus = config_of_focus(
        read_fields(arguments.focus_preset, arguments.focus_overrides, flag="--focus-set")
    )
    return prepared.evaluation(arguments.arms, refine, focus, arguments.output)


def prepare_or_explain(
    arguments: argparse.Namespace, plot: Path | None, make: Callable[[Prepared], R]
) -> R:
    """What `make` makes of a benchmark's model and questions.

    Raises UsageError and CommandError for what cannot be used, before anything is run.
    """
    for flag in ("threads", "num_documents", "max_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    from imprint.adapters.evaluation.extras import MissingExtraError
    from imprint.adapters.evaluation.plot import check_plot
    from imprint.adapters.evaluation.results import OtherEvaluationError
    from imprint.adapters.similarity import EncoderError

    try:
        if plot is not None:
            check_plot()
        return make(_prepare(arguments))
    except MissingExtraError as error:
        raise CommandError(str(error)) from error
    except (ValueError, OtherEvaluationError) as error:
        raise UsageError(str(error)) from error
    except EncoderError as error:
        raise UsageError(f"--reward-encoder: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror or error}") from error


def draw_or_explain(summaries: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Draw them, where a plot is asked for. Raises CommandError where it cannot be written."""
    from imprint.adapters.evaluation.plot import draw

    if path is not None:
        try:
            draw(summaries, path)
        except OSError as error:
            raise CommandError(f"--plot: {path}: {error.strerror or error}") from error


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    from imprint.adapters.evaluation.report import render

    if as_json:
        write_json(report)
    else:
        width = None if sys.stdout.isatty() else _TABLE_WIDTH
        Console(width=width).print(render(report["cells"]))


def _say_interrupted(run: EvaluationRun) -> None:
    wanted = sum(cell.num_cases for cell in run.evaluation.cells)
    done = f"interrupted after {len(run.records)} of {wanted} documents"
    if run.output is None:
        told = f"{done}; with --output FOLDER they would be kept"
    else:
        told = f"{done}; they are in {run.output.folder}, the same command goes on"
    error_console().print(told, markup=False, soft_wrap=True)


class _Display:
    """A line per cell on standard error, where that is a terminal."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        console = error_console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._lines = {
            cell.key: self._progress.add_task(_describe(cell), total=cell.num_cases)
            for cell in cells
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, cell: Cell, arm: str, num_done: int) -> None:
        """Show which arm runs and how many cases of the cell are done."""
        what = f"{_describe(cell)} {arm}"
        self._progress.update(self._lines[cell.key], description=what, completed=num_done)


def _describe(cell: Cell) -> str:
    return cell.title if cell.length is None else f"{cell.title} {cell.length}"


class EvaluationRun:
    """An evaluation with what it has done so far."""

    def __init__(
        self,
        evaluation: Evaluation,
        config: Mapping[str, Any],
        output: ResultFolder | None,
        metrics: Sequence[str],
    ) -> None:
        self.evaluation, self.config, self.output = evaluation, config, output
        self.records: list[Record] = list(output.records) if output else []
        self.metrics = {cell.key: _metric(cell, metrics) for cell in evaluation.cells}

    def finish(self) -> bool:
        """Run what is left; returns whether it was interrupted."""
        done = {(record.cell_key, record.index) for record in self.records}
        try:
            with _Display(self.evaluation.cells) as display:
                for record in self.evaluation.run(done, display.update):
                    if self.output is not None:
                        self.output.append(record)
                    self.records.append(record)
        except KeyboardInterrupt:
            return True
        except ValueError as error:  # a document that cannot be made or asked
            raise UsageError(str(error)) from error
        except OSError as error:
            raise CommandError(f"--output: {error.strerror or error}") from error
        return False

    def records_of(self, cell: Cell) -> list[Record]:
        """What is done of a cell, in the order of its documents."""
        records = [record for record in self.records if record.cell_key == cell.key]
        return sorted(records, key=lambda record: record.index)

    def summarize(self) -> list[dict[str, Any]]:
        """A summary of every cell of which there is a record."""
        from imprint.adapters.evaluation.report import summarize

        summaries = []
        for cell in self.evaluation.cells:
            records = self.records_of(cell)
            if records:
                metric = self.metrics[cell.key]
                summaries.append(summarize(cell, records, metric=metric, seed=self.evaluation.seed))
        return summaries


def _metric(cell: Cell, wanted: Sequence[str]) -> str:
    """The first of the wanted metrics that the cell has; its own first one if none is wanted."""
    metrics = list(cell.scoring.metrics)
    found = [name for name in wanted if name in metrics] if wanted else metrics
    if not found:
        raise ValueError(f"--metric: {cell.task} has {', '.join(metrics)}; name one of them, too")
    return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A benchmark's model and questions, to be answered in any arms and settings."""

    setup: ArmSetup
    material: Material
    config: Mapping[str, Any]
    """What decides the records, save for how documents are adapted."""
    seed: int
    max_tokens: int | None
    metrics: Sequence[str]

    def evaluation(
        self,
        arms: Sequence[str],
        refine: RefineConfig,
        focus: RefineConfig,
        folder: Path | None,
    ) -> EvaluationRun:
        """One evaluation, kept in `folder`. Raises `ValueError` and OtherEvaluationError."""
        from imprint.adapters.evaluation.results import ResultFolder
        from imprint.adapters.evaluation.runner import Evaluation

        evaluation = Evaluation(
            replace(self.setup, refine=refine, focus=focus),
            self.material.cells,
            arms,
            seed=self.seed,
            max_new_tokens=self.max_tokens,
        )
        config = {
            **self.config,
            "arms": evaluation.arms,
            "refine": refine.to_dict(),
            "focus": focus.to_dict(),
        }
        # checked before the folder is made
        run = EvaluationRun(evaluation, config, None, self.metrics)
        if folder is None:
            return run
        return EvaluationRun(evaluation, config, ResultFolder(folder, config), self.metrics)


def _prepare(arguments: argparse.Namespace) -> Prepared:
    """Everything loaded and checked."""
    import torch

    from imprint.adapters.evaluation.results import file_hash
    from imprint.models.checkpoint import weights_hash
    from imprint.models.tokenizer import load_tokenizer

    check_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    folder = model_folder(arguments.model, arguments.revision).folder
    tokenizer = load_tokenizer(folder, question_template=arguments.question_template)
    material = arguments.source(arguments, tokenizer)
    setup = _load(arguments, folder, tokenizer)
    config = {
        "benchmark": arguments.benchmark,
        "imprint": __version__,
        "weights": weights_hash(setup.model),
        "tokenizer": file_hash(folder / "tokenizer.json"),
        "question_template": tokenizer.question_template,
        "device": str(setup.model.device),
        **material.config,
        "inputs": dict(material.inputs),
        "retrieval": asdict(setup.retrieval),
        "reward_encoder": arguments.reward_encoder,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
    }
    return Prepared(
        setup=setup,
        material=material,
        config=config,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        metrics=arguments.metric,
    )


def _load(arguments: argparse.Namespace, folder: Path, tokenizer: Tokenizer) -> ArmSetup:
    import torch

    from imprint.adapters.evaluation.arms import ArmSetup
    from imprint.adapters.evaluation.retrieval import RetrievalConfig
    from imprint.adapters.gate import load_neutral
    from imprint.adapters.similarity import load_similarity
    from imprint.models.checkpoint import load_model
    from imprint.models.host_memory import keep_freed_memory

    keep_freed_memory()
    retrieval = RetrievalConfig(
        passage_tokens=arguments.passage_tokens, num_passages=arguments.passages
    )
    dtype = getattr(torch, arguments.dtype)
    return ArmSetup(
        model=load_model(folder, device=arguments.device, dtype=dtype),
        tokenizer=tokenizer,
        refine=RefineConfig(),
        focus=RefineConfig.preset("focus"),
        retrieval=retrieval,
        neutral=load_neutral(folder, tokenizer),
        similarity=load_similarity(arguments.reward_encoder, tokenizer.decode),
    )
