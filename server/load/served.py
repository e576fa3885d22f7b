"""A server under load, seen from outside: its process where it is ours, its memory, its metrics.

Knows processes and the exposition format; knows nothing of traffic. A server of our own runs in
processes of its own, so that what sends the load takes no time from what serves it.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from imprint.server.client import ImprintClient
from imprint.server.commands.common import CommandError

NOT_INHERITED = ("IMPRINT_API_KEYS", "IMPRINT_API_KEYS_FILE", "IMPRINT_PORT", "IMPRINT_HOST")
START_S = 120.0
STOP_S = 45.0
POLL_S = 0.1
WATCH_S = 2.0
LOG_LINES = 5


class Readings:
    """One scrape of `/metrics`."""

    def __init__(self, text: str) -> None:
        self._samples = [
            (sample.name.removeprefix("imprint_"), sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that have these labels."""
        return sum(
            value
            for found, has, value in self._samples
            if found == name and labels.items() <= has.items()
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sum for each value of a label."""
        values = dict.fromkeys(has[label] for found, has, _ in self._samples if found == name)
        return {value: self.sum(name, **{label: value}) for value in values}


class Served:
    """The server at an address; `pid` where it was started here."""

    def __init__(self, url: str, pid: int | None = None) -> None:
        self.url = url
        self._process = None if pid is None else psutil.Process(pid)

    def readings(self) -> Readings:
        """Scrape it."""
        response = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False)
        response.raise_for_status()
        return Readings(response.text)

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of the API process, where it can be seen, and of the workers."""
        workers = self.readings().by("worker_memory_bytes", "worker")
        found = {name: int(nbytes) for name, nbytes in workers.items()}
        if self._process is not None:
            found["api"] = self._process.memory_info().rss
        return found


class Watch:
    """The largest values seen while it watches."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.peak_memory_bytes: dict[str, int] = {}
        self.longest_quantum_s = 0.0

    def look(self) -> None:
        """Look once."""
        for name, nbytes in self._served.memory_bytes().items():
            self.peak_memory_bytes[name] = max(nbytes, self.peak_memory_bytes.get(name, 0))
        longest_s = self._served.readings().sum("longest_quantum_seconds")
        self.longest_quantum_s = max(longest_s, self.longest_quantum_s)

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(WATCH_S)


@asynccontextmanager
async def watching(served: Served) -> AsyncIterator[Watch]:
    """Watches until the context ends, and once more then."""
    watch = Watch(served)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()  # it ends by itself only with an error
    await asyncio.to_thread(watch.look)


@contextmanager
def own_server(
    folder: Path, *, model: Path, revision: str, flags: Mapping[str, object]
) -> Iterator[Served]:
    """A server of this machine, on a free port, with its data and log in `folder`.

    Variables `IMPRINT_*` hold for it, but for keys and the address. Raises CommandError when it
    does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"port": port, "data-dir": folder / "data", "model": model, "revision": revision}
    command = [sys.executable, "-m", "imprint.server.cli", "serve"]
    for name, value in {**settings, **flags}.items():
        command += [f"--{name}", str(value)] if value != "" else []
    environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log)
        yield Served(url, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    with ImprintClient(url, timeout_s=5.0) as client:
        while not client.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                said = "\n".join(lines[-LOG_LINES:])
                raise CommandError(f"the server did not start; the end of its log:\n{said}")
            time.sleep(POLL_S)
