"""`imprint train plot`: what training runs measured, as one picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from imprint.adapters.evaluation.extras import MissingExtraError
from imprint.adapters.training.rounds import Numbers
from imprint.adapters.training.run_plot import PANELS, draw_runs, read_runs
from imprint.server.commands.common import CommandError, UsageError, write_json
from imprint.server.commands.descriptions import Commands, add_command


def add_parser(phases: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        phases,
        "plot",
        "draw what runs of mid- and post-training measured, over tokens",
        "imprint train plot runs/mid --output mid.png\n"
        "imprint train plot runs/ntp runs/refine --output both.png --mean-over 10",
        run=run,
        description=(
            "Draw losses, rewards and gradient norms over tokens, a line a run. Also of runs that "
            "are under way. Needs the extra eval."
        ),
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="FOLDER", help="--out of a run")
    add("--output", type=Path, required=True, metavar="FILE", help="PNG to write")
    add("--mean-over", type=int, default=1, metavar="N", help="rounds of a running mean; 1: none")
    add("--json", action="store_true", help="say what was drawn, and where runs stand, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Draw, and say how far each run is."""
    if arguments.mean_over < 1:
        raise UsageError(f"--mean-over must be at least 1, got {arguments.mean_over}")
    try:
        runs = read_runs(arguments.runs)
        draw_runs(runs, arguments.output, mean_over=arguments.mean_over)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except MissingExtraError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        name = error.filename or arguments.output
        raise CommandError(f"{name}: {error.strerror or error}") from error
    reports = [_report(folder, rounds, arguments.mean_over) for folder, rounds in runs.items()]
    if arguments.json:
        write_json({"plot": str(arguments.output), "runs": reports})
        return 0
    for report in reports:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in report["last"].items())
        so_far = f"{report['rounds']} rounds, {report['num_tokens']:,} tokens"
        sys.stdout.write(f"{report['folder']}: {so_far}  {numbers}\n")
    sys.stdout.write(f"plot: {arguments.output}\n")
    return 0


def _report(folder: str, rounds: Sequence[Numbers], mean_over: int) -> dict[str, Any]:
    """How far a run is, and the means of its last rounds."""
    values = {name: [r[name] for r in rounds if name in r] for name in PANELS}
    return {
        "folder": folder,
        "rounds": len(rounds),
        "num_tokens": int(rounds[-1]["num_tokens"]),
        "last": {name: fmean(found[-mean_over:]) for name, found in values.items() if found},
    }
