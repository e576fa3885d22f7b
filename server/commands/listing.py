"""What the commands share that list, show and delete a server's objects. Knows terminals only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from imprint.server.client import Adaptation, Page
from imprint.server.commands.common import (
    CommandError,
    UsageError,
    error_console,
    printable,
    write_json,
)

Item = TypeVar("Item")


def add_paging(parser: argparse.ArgumentParser, most: int = 100) -> None:
    """Add the flags of a command that lists."""
    limit = f"at most {most}; default: 20"
    parser.add_argument("--limit", type=int, default=20, metavar="N", help=limit)
    parser.add_argument("--after", metavar="ID", help="the last id of the page before")


def write_page(
    page: Page[Item],
    body: Callable[[Item], dict[str, Any]],
    line: Callable[[Item], str],
    *,
    as_json: bool,
) -> None:
    """A line for each item, or all as JSON; standard error says how to get what follows."""
    if as_json:
        items = [body(item) for item in page.items]
        write_json({"data": items, "has_more": page.has_more, "last_id": page.last_id})
        return
    for item in page.items:
        _write_line(line(item))
    if page.has_more:
        told = f"imprint: there are more: --after {page.last_id}"
        error_console().print(printable(told), markup=False, soft_wrap=True)


def write_object(body: dict[str, Any], line: str, *, as_json: bool) -> None:
    """One result: as a line, or as JSON."""
    if as_json:
        write_json(body)
    else:
        _write_line(line)


def write_deleted(id: str, *, as_json: bool) -> None:
    """That it is gone: in words nothing, as is the custom."""
    if as_json:
        write_json({"id": id, "deleted": True})


@contextmanager
def using_file(name: str, doing: str) -> Iterator[None]:
    """Where it can't be used, raises `UsageError` that names it; `doing` is to read or write."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot {doing} {name}: {error.strerror or error}") from None


def read_file(name: str) -> bytes:
    """The bytes of a file that is to be sent. Raises `UsageError` that names it."""
    with using_file(name, "read"):
        data = Path(name).read_bytes()
    return data


def check_outcome(job: Adaptation) -> None:
    """Raises `CommandError` for an adaptation that came to nothing."""
    if job.status not in ("succeeded", "rejected"):
        error = job.body.get("error") or {}
        raise CommandError(f"the adaptation ended as {job.status}: {error.get('message', '')}")


def _write_line(text: str) -> None:
    sys.stdout.write(printable(text).rstrip() + "\n")
