"""`imprint models`: list those of a server; look into a checkpoint; write a random one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imprint.models.public import PUBLIC_MODELS
from imprint.server.commands.common import (
    UsageError,
    add_settings,
    load_settings,
    printable,
    with_checkpoint,
    write_json,
)
from imprint.server.commands.connection import add_server, ask
from imprint.server.commands.descriptions import Commands, add_command, add_group
from imprint.server.commands.listing import add_paging, write_page
from imprint.server.config import Settings

_INSPECT_SETTINGS = (
    "revision",
    "question_template",
    "dtype",
    "num_slots",
    "segment_tokens",
    "default_preset",
)


def add_parser(commands: Commands) -> None:
    """Describe the command and what it does with models."""
    actions = add_group(
        commands,
        "models",
        "list a server's models, look into a checkpoint, or write a random one",
        "imprint models list\nimprint models inspect fla-hub/delta_net-1.3B-100B",
    )
    listed = add_command(
        actions,
        "list",
        "list what a running server can be asked: its model, then studied documents",
        "imprint models list\nimprint models list --limit 1000 --json",
        run=run_list,
    )
    add_paging(listed, most=1000)
    add_server(listed)
    inspect = add_command(
        actions,
        "inspect",
        "architecture, size, memory, and what is missing",
        "imprint models inspect runs/post/checkpoint\n"
        "imprint models inspect fla-hub/delta_net-1.3B-100B --dtype bfloat16 --json",
        run=run_inspect,
        description=(
            "Say what a checkpoint holds, what it costs to serve and to adapt, and what is wrong "
            "with it, without loading its weights. Exit code 1 if it cannot be served."
        ),
    )
    inspect.add_argument("checkpoint", type=Path, metavar="PATH_OR_HUB_ID")
    inspect.add_argument(
        "--document-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="length of the document whose adaptation is estimated (default: 16384)",
    )
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    add_settings(inspect, _INSPECT_SETTINGS)
    _add_fake(actions)


def _add_fake(actions: Commands) -> None:
    fake = add_command(
        actions,
        "fake",
        "write a random checkpoint of a public configuration",
        "imprint models fake /tmp/noise --like delta_net-1.3B --layers 2 --hidden 256",
        run=run_fake,
        description=(
            "Write a checkpoint with random weights in the shape of a public one, for tests and "
            "for benchmarks of speed. It answers noise."
        ),
    )
    add = fake.add_argument
    add("path", type=Path, metavar="PATH", help="a new or empty folder")
    add("--like", required=True, choices=sorted(PUBLIC_MODELS), help="the public model")
    add("--layers", type=int, metavar="N", help="fewer layers")
    add("--hidden", type=int, metavar="N", help="less width; heads keep theirs and become fewer")
    add("--vocab", type=int, metavar="N", help="smaller vocabulary")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type on disk")
    add("--shard-bytes", type=int, default=2**31, metavar="N", help="size of a file, at most")
    add("--seed", type=int, default=0, metavar="N", help="seed of the weights")
    add("--json", action="store_true", help="print what was written as JSON")


def run_list(arguments: argparse.Namespace) -> int:
    """Print a page."""
    limit, after = arguments.limit, arguments.after
    page = ask(arguments, lambda client: client.models_page(limit=limit, after=after))
    write_page(page, lambda card: card, _card_line, as_json=arguments.json)
    return 0


def _card_line(card: dict[str, Any]) -> str:
    if card.get("parent") is None:
        return f"{card.get('id')}  base"
    return f"{card.get('id')}  {'adapted' if card.get('adapted') else 'not adapted'}"


def run_inspect(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if the checkpoint cannot be served."""
    if arguments.document_tokens < 1:
        raise UsageError(f"--document-tokens must be at least 1, got {arguments.document_tokens}")
    settings = with_checkpoint(load_settings(arguments, model=arguments.checkpoint))
    report = _report(settings, arguments.document_tokens)
    if arguments.json:
        write_json(report)
    else:
        _write(report)
    return 1 if report["problems"] else 0


def run_fake(arguments: argparse.Namespace) -> int:
    """Write the checkpoint and say how large it is."""
    from imprint.models.fake import write_fake

    num_parameters = write_fake(
        arguments.like,
        arguments.path,
        layers=arguments.layers,
        hidden=arguments.hidden,
        vocab=arguments.vocab,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_bytes,
        seed=arguments.seed,
    )
    if arguments.json:
        write_json({"folder": str(arguments.path), "num_parameters": num_parameters})
    else:
        sys.stdout.write(f"{arguments.path}: {num_parameters:,} random parameters\n")
    return 0


def _report(settings: Settings, document_tokens: int) -> dict[str, Any]:
    """The inspection and the memory it takes to serve and to adapt, as the server counts it."""
    import torch

    from imprint.adapters.config import RefineConfig
    from imprint.models.inspection import inspect_checkpoint
    from imprint.server.studies import estimate_bytes

    found, model = inspect_checkpoint(
        settings.model,
        dtype=getattr(torch, settings.dtype),
        question_template=settings.question_template,
    )
    segment_tokens = settings.segment_tokens
    config = RefineConfig.preset(settings.default_preset)
    config = config.replace(segment_tokens=min(config.segment_tokens, segment_tokens))
    return {
        "model": settings.served_model_name,
        "folder": str(settings.model),
        **asdict(found),
        "num_slots": settings.num_slots,
        "serve_bytes": found.weight_bytes + settings.num_slots * found.state_bytes,
        "document_tokens": document_tokens,
        "preset": settings.default_preset,
        "adapt_bytes": estimate_bytes(model, document_tokens, config, segment_tokens),
    }


def _write(report: dict[str, Any]) -> None:
    files = report["stored_bytes"]
    types = ", ".join(f"{count} {name}" for name, count in report["stored_dtypes"].items())
    lines = [
        ("model", report["model"]),
        ("folder", report["folder"]),
        ("architecture", f"{report['architecture']} ({report['model_type']})"),
        ("parameters", f"{report['num_parameters']:,}"),
        ("on disk", f"{_size(sum(files.values()))} in {len(files)} file(s): {types or 'nothing'}"),
        ("weights", f"{_size(report['weight_bytes'])} in {report['dtype']}"),
        ("state", f"{_size(report['state_bytes'])} per document, of any length"),
        ("to serve", f"{_size(report['serve_bytes'])} with {report['num_slots']} slots"),
        (
            "to adapt",
            f"{_size(report['adapt_bytes'])} more for {report['document_tokens']} tokens, at most "
            f"(preset {report['preset']})",
        ),
        ("question", repr(report["question_template"])),
        *(("problem", problem) for problem in report["problems"]),
        *(("note", note) for note in report["notes"]),
    ]
    for name, value in lines:
        sys.stdout.write(printable(f"{name:14} {value}\n"))


def _size(num_bytes: int) -> str:
    """Bytes in a unit that keeps the number short; units of 1000."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
