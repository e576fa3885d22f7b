"""A server for one command: the real app and worker pool, on a free local port, in a thread.

What goes wrong while it starts is raised in the caller's thread.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from imprint.models.registry import load_config
from imprint.server.app import create_app
from imprint.server.client import ImprintClient
from imprint.server.commands.common import CommandError
from imprint.server.config import Settings
from imprint.server.journal_file import JournalError
from imprint.server.launching import LaunchError
from imprint.server.pool import Pool
from imprint.server.protocol import uvicorn_config

_POLL_S = 0.05
_STOP_S = 15.0


@contextmanager
def local_server(settings: Settings, pool: Pool | None = None) -> Iterator[str]:
    """The address of a server that is ready; it stops, with its worker, when the context ends.

    `pool` is for a caller that listens to it; otherwise there is one as `settings` say.

    Raises CheckpointError for an unusable model folder, CommandError when it cannot start.
    """
    # on the loopback, for this command alone: no key is asked for
    settings = settings.model_copy(update={"api_keys": None, "api_keys_file": None})
    load_config(settings.model)  # the worker would say this in its log only
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pool = pool or Pool(settings.pool_config())
        thread = _ServerThread(create_app(settings, pool), settings, listening)
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            _wait_until_ready(url, thread, settings.startup_timeout_s)
            yield url
        finally:
            thread.stop()


class _ServerThread(threading.Thread):
    """Runs uvicorn and the app's lifespan; `failure` holds what ended it before its time."""

    def __init__(self, app: FastAPI, settings: Settings, listening: socket.socket) -> None:
        super().__init__(name="imprint-server", daemon=True)
        self.failure: Exception | None = None
        self._app = app
        self._listening = listening
        self._server = uvicorn.Server(uvicorn_config(app, settings))

    def run(self) -> None:
        """Serve until `stop`, or until the app cannot start."""
        try:
            asyncio.run(self._serve())
        except (LaunchError, OSError, JournalError) as error:
            self.failure = error

    async def _serve(self) -> None:
        # the lifespan is entered here and not by uvicorn, which would swallow its errors
        async with self._app.router.lifespan_context(self._app):
            await self._server.serve(sockets=[self._listening])

    @property
    def serving(self) -> bool:
        """Whether requests are accepted."""
        return self._server.started

    def stop(self) -> None:
        """Shut down and wait for it, a bounded time."""
        self._server.should_exit = True
        self.join(_STOP_S)


def _wait_until_ready(url: str, thread: _ServerThread, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with ImprintClient(url, timeout_s=5.0) as client:
        while not client.is_ready():
            if not thread.is_alive():
                raise CommandError(f"the local server did not start: {thread.failure}")
            if thread.serving and _num_restarts(client):
                raise CommandError("the worker dies while it starts; its log above says why")
            if time.monotonic() > deadline:
                raise CommandError(f"the model was not loaded within {timeout_s:g} s")
            time.sleep(_POLL_S)


def _num_restarts(client: ImprintClient) -> int:
    workers = client.health().get("workers", [])
    return sum(sum(worker["restarts"].values()) for worker in workers)
