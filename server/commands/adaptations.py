"""`imprint adaptations`: list, follow, cancel, export and delete jobs of a running server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from imprint.server.client import Adaptation, ImprintClient, Page
from imprint.server.commands.common import CommandError, UsageError, printable, write_json
from imprint.server.commands.connection import Described, add_action, add_paging, add_server, ask
from imprint.server.commands.progress import StudyDisplay

_EXAMPLES = """\
examples:
  imprint adaptations list
  imprint adaptations follow adp_8e1f0a2b3c4d5e6f70819203
  imprint adaptations export adp_8e1f0a2b3c4d5e6f70819203 harbour.safetensors
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command and what it does with adaptations."""
    actions = Described("adaptations", "jobs of a running server", _EXAMPLES).add_to(commands)
    listed = add_action(actions, "list", "list adaptations, newest first", run_list)
    add_paging(listed)
    add_server(listed)
    for name, about, run in (
        ("show", "show an adaptation", run_show),
        ("follow", "follow an adaptation to its end", run_follow),
        ("cancel", "stop an adaptation", run_cancel),
        ("delete", "delete an adaptation", run_delete),
        ("export", "download an adapter as a safetensors file", run_export),
    ):
        action = add_action(actions, name, about, run)
        action.add_argument("id", metavar="ID")
        if name == "export":
            action.add_argument("file", metavar="FILE", help="a new file")
        add_server(action)


def run_list(arguments: argparse.Namespace) -> int:
    """Print a page."""

    def call(client: ImprintClient) -> Page[Adaptation]:
        return client.adaptations_page(limit=arguments.limit, after=arguments.after)

    page = ask(arguments, call)
    if arguments.json:
        write_json({"data": [item.body for item in page.items], "has_more": page.has_more})
        return 0
    for job in page.items:
        _write(job, False)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Print an adaptation."""
    _write(ask(arguments, lambda client: client.adaptation(arguments.id)), arguments.json)
    return 0


def run_follow(arguments: argparse.Namespace) -> int:
    """Show progress on standard error until it has ended; 1 where it came to nothing."""
    with StudyDisplay() as display:
        job = ask(arguments, lambda client: client.wait(arguments.id, display.show))
    _write(job, arguments.json)
    if job.status not in ("succeeded", "rejected"):
        raise CommandError(f"the adaptation ended as {job.status}")
    return 0


def run_cancel(arguments: argparse.Namespace) -> int:
    """Stop it."""
    _write(ask(arguments, lambda client: client.cancel(arguments.id)), arguments.json)
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    """Delete it."""
    ask(arguments, lambda client: client.delete(arguments.id))
    if arguments.json:
        write_json({"id": arguments.id, "deleted": True})
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


def _write(job: Adaptation, as_json: bool) -> None:
    if as_json:
        write_json(job.body)
    else:
        tokens = job.body.get("num_tokens", "?")
        sys.stdout.write(printable(f"{job.id}  {job.status}  {tokens} tokens\n"))
