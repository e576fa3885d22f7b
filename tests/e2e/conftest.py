"""Servers on a random tiny model, started and stopped for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imprint.adapters import faults
from support.live_server import LiveServer

Live = Callable[..., LiveServer]


@pytest.fixture
def live(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Live]:
    """Starts servers; `live(*flags, plan=..., data=...)`. They are stopped at the end."""
    with ExitStack() as stack:

        def start(*flags: str, plan: str = "", data: str = "data") -> LiveServer:
            env = {faults.VARIABLE: plan} if plan else {}
            server = LiveServer(tmp_path / data, "--model", str(tiny_checkpoint), *flags, env=env)
            return stack.enter_context(server)

        yield start


class KeyedServer(LiveServer):
    """A server that asks for a key."""

    key = "sk-tester-0123456789"

    def __init__(self, model: Path, folder: Path) -> None:
        keys = folder / "keys"
        keys.write_text(f"tester:{self.key}\n", encoding="utf-8")
        flags = ("--api-keys-file", str(keys), "--drain-timeout-s", "0")
        super().__init__(folder / "data", "--model", str(model), *flags)


@pytest.fixture(scope="module")
def keyed_live(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedServer]:
    """One server with a key for a whole file of tests that leave it as it is."""
    with KeyedServer(tiny_checkpoint, tmp_path_factory.mktemp("keyed")) as server:
        server.wait_until_ready()
        yield server
