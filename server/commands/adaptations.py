"""`imprint adaptations`: list, follow, cancel, export, import and delete jobs of a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from imprint.server.client import Adaptation, ImprintClient
from imprint.server.commands.common import CommandError, UsageError, write_json
from imprint.server.commands.connection import add_server, ask
from imprint.server.commands.descriptions import Commands, Run, add_command, add_group
from imprint.server.commands.listing import (
    add_paging,
    read_file,
    write_deleted,
    write_line,
    write_page,
)
from imprint.server.commands.progress import StudyDisplay

_ID = "adp_8e1f0a2b3c4d5e6f70819203"


def add_parser(commands: Commands) -> None:
    """Describe the command and what it does with adaptations."""
    actions = add_group(
        commands,
        "adaptations",
        "jobs of a running server",
        f"imprint adaptations list\nimprint adaptations follow {_ID}",
    )

    def action(name: str, about: str, run: Run, examples: str) -> argparse.ArgumentParser:
        return add_command(actions, name, about, examples, run=run)

    add_paging(
        action(
            "list",
            "list adaptations, newest first",
            run_list,
            f"imprint adaptations list\nimprint adaptations list --after {_ID} --json",
        )
    )
    for name, about, run in (
        ("show", "show an adaptation", run_show),
        ("follow", "follow an adaptation to its end", run_follow),
        ("cancel", "stop an adaptation", run_cancel),
        ("delete", "delete an adaptation", run_delete),
    ):
        example = f"imprint adaptations {name} {_ID}"
        action(name, about, run, example).add_argument("id", metavar="ID")
    export = action(
        "export",
        "download an adapter as a safetensors file",
        run_export,
        f"imprint adaptations export {_ID} harbour.safetensors",
    )
    export.add_argument("id", metavar="ID")
    export.add_argument("file", metavar="FILE", help="a new file")
    taken = action(
        "import",
        "take in an adapter's file, of any server of the same model",
        run_import,
        "imprint adaptations import harbour.safetensors",
    )
    taken.add_argument("file", metavar="FILE", help="what `imprint adaptations export` wrote")
    for parser in actions.choices.values():
        add_server(parser)


def run_list(arguments: argparse.Namespace) -> int:
    """Print a page."""
    limit, after = arguments.limit, arguments.after
    page = ask(arguments, lambda client: client.adaptations_page(limit=limit, after=after))
    write_page(page, lambda job: job.body, _line, as_json=arguments.json)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Print an adaptation."""
    _write(ask(arguments, lambda client: client.adaptation(arguments.id)), arguments.json)
    return 0


def run_follow(arguments: argparse.Namespace) -> int:
    """Show progress on standard error until it has ended; 1 where it came to nothing."""
    with StudyDisplay() as display:
        job = ask(arguments, lambda client: client.wait(arguments.id, display.show))
    return _write_outcome(job, arguments.json)


def run_cancel(arguments: argparse.Namespace) -> int:
    """Stop it."""
    _write(ask(arguments, lambda client: client.cancel(arguments.id)), arguments.json)
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    """Delete it."""
    ask(arguments, lambda client: client.delete(arguments.id))
    write_deleted(arguments.id, as_json=arguments.json)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write the adapter's file; an existing one is not written over."""
    data = ask(arguments, lambda client: client.adapter(arguments.id))
    try:
        with Path(arguments.file).open("xb") as file:
            file.write(data)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {arguments.file}: {reason}") from None
    if arguments.json:
        write_json({"id": arguments.id, "file": arguments.file, "bytes": len(data)})
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Send the file, wait for the worker's verdict on it, print the adaptation."""
    data = read_file(arguments.file)

    def call(client: ImprintClient) -> Adaptation:
        return client.wait(client.import_adapter(data).id)

    return _write_outcome(ask(arguments, call), arguments.json)


def _line(job: Adaptation) -> str:
    return f"{job.id}  {job.status}  {job.body.get('num_tokens', '?')} tokens"


def _write(job: Adaptation, as_json: bool) -> None:
    if as_json:
        write_json(job.body)
    else:
        write_line(_line(job))


def _write_outcome(job: Adaptation, as_json: bool) -> int:
    _write(job, as_json)
    if job.status not in ("succeeded", "rejected"):
        error = job.body.get("error") or {}
        raise CommandError(f"the adaptation ended as {job.status}: {error.get('message', '')}")
    return 0
