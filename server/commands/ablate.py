"""`imprint eval ablate`: a grid of adaptations on the same documents, each compared with the base.

Knows files and terminals; what a grid is, and what came of it, is in `imprint.adapters.evaluation`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprint.adapters.config import RefineConfig
from imprint.server.commands.common import UsageError, error_console, write_json
from imprint.server.commands.descriptions import Commands, add_command
from imprint.server.commands.evaluation_run import (
    INTERRUPTED,
    EvaluationRun,
    Prepared,
    draw_or_explain,
    prepare_or_explain,
)

if TYPE_CHECKING:
    from imprint.adapters.evaluation.grid import Grid

Parser = Callable[[Sequence[str]], argparse.Namespace]


def add_parser(benchmarks: Commands, parse: Parser) -> None:
    """Describe the command. `parse` reads the words that say what is asked."""
    parser = add_command(
        benchmarks,
        "ablate",
        "a grid of adaptations, compared on the same documents",
        "imprint eval ablate grid.toml\n"
        "imprint eval ablate grid.toml --output runs/grid --plot grid.png > grid.md",
        run=lambda arguments: run(arguments, parse),
        description=(
            "GRID.toml names a benchmark, arms, and fields of the method with the values of each. "
            "Every combination answers the same questions about the same documents with the same "
            "seeds. The table is Markdown."
        ),
    )
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID.toml", help="see docs/ablations.md")
    add("--output", type=Path, metavar="FOLDER", help="keep what is done; go on from it")
    add("--plot", type=Path, metavar="FILE", help="draw a PNG; needs the extra eval")
    add("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace, parse: Parser) -> int:
    """Run every point; the report goes to standard output, progress to standard error.

    An interruption reports what is done by then, with exit code 130.
    """
    from imprint.adapters.evaluation.grid import GridError, load_grid

    started = time.perf_counter()
    try:
        grid = load_grid(arguments.grid)
    except GridError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot read {arguments.grid}: {error.strerror or error}") from None
    asked = parse(grid.benchmark)
    ablation = prepare_or_explain(
        asked, arguments.plot, lambda prepared: _Ablation(prepared, grid, arguments.output)
    )
    interrupted = ablation.finish()
    summaries = ablation.summarize()
    if not summaries:
        raise KeyboardInterrupt
    draw_or_explain(summaries, arguments.plot)
    if arguments.json:
        write_json(
            {
                "benchmark": " ".join(grid.benchmark),
                "command": sys.argv[1:],
                "model": str(asked.model),
                "config": ablation.prepared.config,
                "threads": asked.threads,
                "seconds": time.perf_counter() - started,
                "interrupted": interrupted,
                "num_points": len(grid.points),
                "cells": summaries,
            }
        )
    else:
        from imprint.adapters.evaluation.ablation import to_markdown

        sys.stdout.write(to_markdown(summaries, grid.axes))
    if interrupted:
        kept = "is lost" if arguments.output is None else "is kept; the same command goes on"
        error_console().print(f"interrupted; what is done {kept}", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


class _Ablation:
    """The baselines and every study of a grid, each an evaluation with a folder of its own."""

    def __init__(self, prepared: Prepared, grid: Grid, output: Path | None) -> None:
        self.prepared, self.grid = prepared, grid
        # what baselines do does not depend on how others adapt
        neutral = RefineConfig(), RefineConfig.preset("focus")
        self._base = self._run("base", grid.baselines, *neutral, output)
        self._studies: dict[tuple[bool, RefineConfig], EvaluationRun] = {}
        for (is_focus, config), points in grid.studies.items():
            refine, focus = (neutral[0], config) if is_focus else (config, neutral[1])
            arms = tuple(point.arm for point in points)
            name = _folder_name(arms[0] if is_focus else "study", config)
            run = self._run(name, arms, refine, focus, output)
            self._studies[is_focus, config] = run

    def _run(
        self,
        name: str,
        arms: tuple[str, ...],
        refine: RefineConfig,
        focus: RefineConfig,
        output: Path | None,
    ) -> EvaluationRun:
        folder = None if output is None else output / name
        return self.prepared.evaluation(arms, refine, focus, folder)

    def finish(self) -> bool:
        """Run what is left; returns whether it was interrupted."""
        console = error_console()
        told = [", ".join(self.grid.baselines)]
        told += [", ".join(p.label for p in points) for points in self.grid.studies.values()]
        runs = [self._base, *self._studies.values()]
        for number, (what, run) in enumerate(zip(told, runs, strict=True)):
            if console.is_terminal:
                console.print(f"{number} of {len(self._studies)}: {what}", markup=False)
            if run.finish():
                return True
        return False

    def summarize(self) -> list[dict[str, Any]]:
        """A summary of every cell of which the baselines have a record."""
        from imprint.adapters.evaluation.ablation import summarize_points

        return [
            summarize_points(
                cell,
                self._base.records_of(cell),
                [(p, self._studies[p.study].records_of(cell)) for p in self.grid.points],
                metric=self._base.metrics[cell.key],
                seed=self._base.evaluation.seed,
            )
            for cell in self._base.evaluation.cells
            if self._base.records_of(cell)
        ]


def _folder_name(kind: str, config: RefineConfig) -> str:
    from imprint.adapters.evaluation.results import config_hash

    return f"{kind}-{config_hash(config.to_dict())[:12]}"
