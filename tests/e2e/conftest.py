"""A real server with real workers on a random tiny model, for tests that break it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors import safe_open

from imprint.adapters import faults


class LiveServer:
    """One `imprint serve` process and its workers."""

    def __init__(self, model: Path, data: Path, *flags: str, plan: str = "") -> None:
        self.data = data
        self.log = data.parent / f"log-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "imprint.server.cli", "serve", "--port", "0"]
        command += ["--model", str(model), "--data-dir", str(data), *flags]
        environ = {**os.environ, **({faults.VARIABLE: plan} if plan else {})}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        port = self.wait(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read_text()))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port.group(1)}", timeout=60)

    def wait(self, condition: Callable[[], Any], *, s: float = 60) -> Any:
        """What the condition gives, once it is true."""
        deadline = time.monotonic() + s
        while not (result := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return result

    def wait_for_workers(self, number: int = 1) -> None:
        # each of them loads torch, side by side: a busy machine takes long for that
        self.wait(lambda: sum(worker["up"] for worker in self.workers()) >= number, s=100)

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/health").json()["workers"]
        return found

    def kill_a_worker(self, choice: int) -> None:
        """kill -9, as from outside."""
        running = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "imprint.server.worker" in child.cmdline()
        ]
        if running:
            running[choice % len(running)].send_signal(signal.SIGKILL)

    def adapt(self, document: str, **body: Any) -> str:
        response = self.http.post("/v1/adaptations", json={"document": document, **body})
        assert response.status_code in (200, 202), response.text
        return str(response.json()["id"])

    def job(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/adaptations/{id}").json()
        return found

    def ended(self, id: str) -> dict[str, Any]:
        """The job, when it has an outcome."""
        self.wait(lambda: self.job(id)["status"] not in ("queued", "running"), s=90)
        return self.job(id)

    def events(self, id: str) -> list[dict[str, Any]]:
        page = self.http.get(f"/v1/adaptations/{id}/events", params={"limit": 100}).json()
        found: list[dict[str, Any]] = page["data"]
        return found

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels."""
        lines = [x for x in self.http.get("/metrics").text.splitlines() if not x.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def checksum(self, id: str) -> str:
        """Over every bit of an adapter and its manifest."""
        with safe_open(self.data / "adapters" / f"{id}.safetensors", framework="pt") as file:
            return str(file.metadata()["sha256"])

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


Live = Callable[..., LiveServer]


@pytest.fixture
def live(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Live]:
    """Starts servers; `live(*flags, plan=..., data=...)`. They are stopped at the end."""
    with ExitStack() as stack:

        def start(*flags: str, plan: str = "", data: str = "data") -> LiveServer:
            server = LiveServer(tiny_checkpoint, tmp_path / data, *flags, plan=plan)
            stack.callback(server.stop)
            return server

        yield start


class KeyedServer(LiveServer):
    """A server that asks for a key."""

    key = "sk-tester-0123456789"

    def __init__(self, model: Path, folder: Path) -> None:
        keys = folder / "keys"
        keys.write_text(f"tester:{self.key}\n", encoding="utf-8")
        flags = ("--api-keys-file", str(keys), "--drain-timeout-s", "0")
        super().__init__(model, folder / "data", *flags)


@pytest.fixture(scope="module")
def keyed_live(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedServer]:
    """One server with a key for a whole file of tests that leave it as it is."""
    with ExitStack() as stack:
        server = KeyedServer(tiny_checkpoint, tmp_path_factory.mktemp("keyed"))
        stack.callback(server.stop)
        server.wait_for_workers()
        yield server
