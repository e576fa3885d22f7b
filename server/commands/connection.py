"""Which server a command talks to: the one at `--url`, or one of its own on a free local port."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from imprint.server.client import ImprintClient
from imprint.server.commands.common import (
    UsageError,
    add_settings,
    load_settings,
    with_checkpoint,
)
from imprint.server.commands.progress import StudyDisplay
from imprint.server.config import KEY_VARIABLE

Result = TypeVar("Result")
_URL = "http://127.0.0.1:8765"
_LOCAL_SETTINGS = ("model", "revision", "question_template", "device", "dtype", "threads")


def add_connection(parser: argparse.ArgumentParser, *settings: str) -> None:
    """Add `--url` and the settings (the usual ones, and `settings`) of a server of our own."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", help="ask this running server; else one runs for this command only")
    _add_key(group)
    add_settings(group, (*_LOCAL_SETTINGS, *settings))


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that asks a running server."""
    parser.add_argument("--json", action="store_true", help="print the server's objects as JSON")
    parser.add_argument("--url", default=_URL, help=f"the running server (default: {_URL})")
    _add_key(parser)


def ask(arguments: argparse.Namespace, call: Callable[[ImprintClient], Result]) -> Result:
    """What the server at `--url` answers to one call."""
    with ImprintClient(arguments.url, api_key=_api_key(arguments)) as client:
        return call(client)


def _add_key(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with the key that the server asks for; else the variable {KEY_VARIABLE}",
    )


def _api_key(arguments: argparse.Namespace) -> str | None:
    path: Path | None = arguments.api_key_file
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"the key in {path} cannot be read") from None


@contextmanager
def connect(
    arguments: argparse.Namespace, display: StudyDisplay, *, keep: bool
) -> Iterator[ImprintClient]:
    """A client of a server that is ready. A server of our own stops with the context.

    Without `keep` its data folder is a temporary one. Raises `UsageError` for settings that a
    running server does not take from here.
    """
    if arguments.url is not None:
        given = [name for name in (*_LOCAL_SETTINGS, "data_dir") if name in arguments]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} cannot go with --url")
        with ImprintClient(arguments.url, api_key=_api_key(arguments)) as client:
            yield client
        return
    from imprint.server.commands.local_server import local_server

    with ExitStack() as stack:
        fixed: dict[str, object] = {"log_level": "error", "drain_timeout_s": 1.0}
        if not keep:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="imprint-"))
            fixed["data_dir"] = Path(folder)
        display.say("loading the model")
        settings = with_checkpoint(load_settings(arguments, **fixed))
        url = stack.enter_context(local_server(settings))
        yield stack.enter_context(ImprintClient(url))
