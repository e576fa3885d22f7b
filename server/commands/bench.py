"""`imprint bench`: what a step and an answer cost on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from imprint.server.commands.common import CommandError, UsageError, error_console, write_json
from imprint.server.config import BUNDLED_MODEL


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command and its benchmarks."""
    parser = commands.add_parser("bench", help="measure time and memory on this machine")
    benchmarks = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    step = benchmarks.add_parser(
        "step",
        help="an optimisation step against one reading and against the published loop",
        description=(
            "Time an optimisation step against one reading of the document and against the "
            "published loop, compare their gradients, and measure peak memory. Needs a clone: the "
            "published loop lives in tests/."
        ),
    )
    _add_common(step)
    step.add_argument("--num-tokens", type=int, default=4096, metavar="N", help="document length")
    step.add_argument("--positions", type=int, default=8, metavar="N", help="positions per step")
    step.add_argument("--rollout-length", type=int, default=5, metavar="N", help="rollout tokens")
    step.add_argument("--repeats", type=int, default=7, metavar="N", help="timed pairs")
    step.set_defaults(run=run_step)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, default=BUNDLED_MODEL, metavar="FOLDER", help="checkpoint folder")
    add("--threads", type=int, default=1, metavar="N", help="threads of torch")
    add("--json", action="store_true", help="print all numbers as JSON")


def run_step(arguments: argparse.Namespace) -> int:
    """Run `imprint.adapters.step_benchmark`."""
    _check(arguments, "threads", "num_tokens", "positions", "rollout_length", "repeats")
    from imprint.adapters.step_benchmark import run_step_benchmark

    try:
        numbers = run_step_benchmark(
            model=arguments.model,
            num_tokens=arguments.num_tokens,
            positions=arguments.positions,
            rollout_length=arguments.rollout_length,
            repeats=arguments.repeats,
            threads=arguments.threads,
            progress=_say,
        )
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error
    _write(numbers, as_json=arguments.json)
    return 0


def _check(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be at least 1, got {getattr(arguments, name)}")


def _say(what: str) -> None:
    error_console().print(what, markup=False)


def _write(numbers: dict[str, Any], *, as_json: bool) -> None:
    """Everything as JSON, or the plain numbers one a line."""
    if as_json:
        write_json({"command": sys.argv[1:], **numbers})
        return
    for name, value in numbers.items():
        if isinstance(value, float):
            sys.stdout.write(f"{name:28} {value:.4g}\n")
        elif isinstance(value, int | str):
            sys.stdout.write(f"{name:28} {value}\n")
