"""How a worker's process is started, awaited and killed: here, as a child of the API process.

`server/ray_launching.py` does the same on the machines of a Ray cluster. Knows processes; knows
nothing of what a worker does, nor when it should end.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Protocol

import msgspec

from imprint.server.worker_config import WorkerStart

KEYS_VARIABLE = "IMPRINT_API_KEYS"
"""The keys of the server's clients: no worker has a use for them."""


class LaunchError(RuntimeError):
    """Workers cannot be started at all; the message says what to do."""


class Launched(Protocol):
    """A worker that was started, until after its end."""

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""

    async def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most `timeout_s`."""

    def kill(self) -> None:
        """End it at once, if it still runs."""


class Launcher(Protocol):
    """Where workers run."""

    parent_pid: int | None
    """Of the process that a worker is a child of; None where something else ends what is left."""

    def device(self, device: str, index: int, num_workers: int) -> str:
        """The device of one of several workers, as torch names it."""

    async def open(self) -> str | None:
        """Be ready to launch. The address of this machine for workers on others; None where all
        run on this one. Raises LaunchError."""

    async def launch(self, start: WorkerStart, variables: Mapping[str, str]) -> Launched:
        """Start one worker, with these variables in its environment. Raises OSError."""

    async def close(self) -> None:
        """Leave nothing that `open` began. Every worker has ended before."""


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """This process's variables without the keys of its clients."""
    return {name: value for name, value in environ.items() if name != KEYS_VARIABLE}


class LocalWorker:
    """A child of this process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


class LocalLauncher:
    """Workers are children of this process, and die with it."""

    parent_pid: int | None

    def __init__(self) -> None:
        self.parent_pid = os.getpid()

    def device(self, device: str, index: int, num_workers: int) -> str:
        """Each GPU has its own worker, a CPU is shared."""
        return f"cuda:{index}" if device == "cuda" and num_workers > 1 else device

    async def open(self) -> str | None:
        return None

    async def launch(self, start: WorkerStart, variables: Mapping[str, str]) -> LocalWorker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "imprint.server.worker",
            msgspec.json.encode(start).decode(),
            env={**worker_environment(os.environ), **variables},
            start_new_session=True,  # a Ctrl-C in the terminal is for the API process alone
        )
        return LocalWorker(process)

    async def close(self) -> None:
        pass
