"""`imprint adapt`: study a file without questions and keep what was learned."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

from imprint.adapters.config import config_of_study
from imprint.server.client import Adaptation
from imprint.server.commands.common import read_document, read_fields, write_json
from imprint.server.commands.connection import add_connection, connect
from imprint.server.commands.descriptions import Commands, add_command
from imprint.server.commands.listing import check_outcome
from imprint.server.commands.progress import StudyDisplay


def add_parser(commands: Commands) -> None:
    """Describe the command."""
    parser = add_command(
        commands,
        "adapt",
        "study a file and keep the adapter",
        "imprint adapt report.txt\n"
        "imprint adapt report.txt --preset fast --set steps=8 --seed 3\n"
        "imprint adapt report.txt --url http://127.0.0.1:8765 --json",
        description=(
            "Study a file without questions and keep the adapter. Without --url it is kept in the "
            "data folder, where `imprint serve` finds it."
        ),
        run=run,
    )
    parser.add_argument("file", metavar="FILE", help="text file, UTF-8; - is standard input")
    parser.add_argument("--preset", help="default, fast or paper")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="FIELD=VALUE",
        help="override one field of the preset, such as steps=8; may be given several times",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the adaptation")
    parser.add_argument("--json", action="store_true", help="print the adaptation as JSON")
    add_connection(parser, "data_dir")


def run(arguments: argparse.Namespace) -> int:
    """Adapt, show progress on standard error, print the outcome."""
    document = read_document(arguments.file)
    fields = read_fields(arguments.preset, arguments.overrides)
    config_of_study(fields)  # a wrong field is told before any work
    method = {"type": "refine", **fields}
    with ExitStack() as stack:
        display = stack.enter_context(StudyDisplay())
        client = stack.enter_context(connect(arguments, display, keep=True))
        job = client.adapt(document, method=method, seed=arguments.seed)
        job = client.wait(job.id, display.show)
    if arguments.json:
        write_json(job.body)
    else:
        _write_outcome(job)
    check_outcome(job)
    return 0


def _write_outcome(job: Adaptation) -> None:
    result = job.body.get("result") or {}
    sys.stdout.write(f"{job.id} {job.status}\n")
    for name in ("probe_before", "probe_after", "alpha", "best_step"):
        if result.get(name) is not None:
            sys.stdout.write(f"  {name}: {result[name]}\n")
