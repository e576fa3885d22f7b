"""`imprint adaptations`: list, follow, cancel, export, import and delete jobs of a server."""

from __future__ import annotations

import argparse
from functools import partial

from imprint.server.client import Adaptation, ImprintClient
from imprint.server.commands.common import write_json
from imprint.server.commands.connection import add_server, ask
from imprint.server.commands.descriptions import Commands, add_command, add_group
from imprint.server.commands.listing import (
    add_paging,
    check_outcome,
    using_file,
    write_deleted,
    write_object,
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
    action = partial(add_command, actions)
    add_paging(
        action(
            "list",
            "list adaptations, newest first",
            f"imprint adaptations list\nimprint adaptations list --after {_ID} --json",
            run=run_list,
        )
    )
    for name, about, run in (
        ("show", "show an adaptation", run_show),
        ("follow", "follow an adaptation to its end", run_follow),
        ("cancel", "stop an adaptation", run_cancel),
        ("delete", "delete an adaptation", run_delete),
    ):
        example = f"imprint adaptations {name} {_ID}"
        action(name, about, example, run=run).add_argument("id", metavar="ID")
    export = action(
        "export",
        "download an adapter as a safetensors file",
        f"imprint adaptations export {_ID} harbour.safetensors",
        run=run_export,
    )
    export.add_argument("id", metavar="ID")
    export.add_argument("file", metavar="FILE", help="a new file")
    taken = action(
        "import",
        "take in an adapter's file, of any server of the same model",
        "imprint adaptations import harbour.safetensors",
        run=run_import,
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
    _write(ask(arguments, lambda client: client.adaptation(arguments.id)), as_json=arguments.json)
    return 0


def run_follow(arguments: argparse.Namespace) -> int:
    """Show progress on standard error until it has ended; 1 where it came to nothing."""
    with StudyDisplay() as display:
        job = ask(arguments, lambda client: client.wait(arguments.id, display.show))
    _write(job, as_json=arguments.json)
    check_outcome(job)
    return 0


def run_cancel(arguments: argparse.Namespace) -> int:
    """Stop it."""
    _write(ask(arguments, lambda client: client.cancel(arguments.id)), as_json=arguments.json)
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    """Delete it."""
    ask(arguments, lambda client: client.delete(arguments.id))
    write_deleted(arguments.id, as_json=arguments.json)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write the adapter's file; an existing one is not written over."""
    with using_file(arguments.file, "write"):
        size = ask(arguments, lambda client: client.export_adapter(arguments.id, arguments.file))
    if arguments.json:
        write_json({"id": arguments.id, "file": arguments.file, "bytes": size})
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """Send the file, wait for the worker's verdict on it, print the adaptation."""

    def call(client: ImprintClient) -> Adaptation:
        return client.wait(client.import_adapter(arguments.file).id)

    with using_file(arguments.file, "read"):
        job = ask(arguments, call)
    _write(job, as_json=arguments.json)
    check_outcome(job)
    return 0


def _line(job: Adaptation) -> str:
    return f"{job.id}  {job.status}  {job.body.get('num_tokens', '?')} tokens"


def _write(job: Adaptation, *, as_json: bool) -> None:
    write_object(job.body, _line(job), as_json=as_json)
