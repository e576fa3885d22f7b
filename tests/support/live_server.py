"""A real server with real workers in processes of their own, for tests that watch or break it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from safetensors import safe_open

COMMAND = [sys.executable, "-m", "imprint.server.cli", "serve", "--port", "0"]
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


class LiveServer:
    """One `imprint serve` process; it has said its address, and is stopped where the block ends.

    A worker loads torch, and a busy machine takes long for that: deadlines are generous.
    """

    def __init__(self, data: Path, *flags: str, env: Mapping[str, str] | None = None) -> None:
        """`env` is added to the variables of this process."""
        self.data = data
        self.log = data.parent / f"log-{time.monotonic_ns()}"
        command = [*COMMAND, "--data-dir", str(data), *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **(env or {})}
            )
        try:
            self.url: str = self.wait(lambda: ADDRESS.search(self.log.read_text()), s=150)[0]
        except BaseException:  # nobody else can stop it yet
            self.process.kill()
            self.process.wait()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._children: list[psutil.Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server in its own way, or by force where that takes too long."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def wait(self, condition: Callable[[], Any], *, s: float = 90) -> Any:
        """What the condition gives, once it is true."""
        deadline = time.monotonic() + s
        while not (result := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return result

    def wait_until_ready(self) -> None:
        """Until questions may come."""
        self.wait(lambda: self.http.get("/health/ready").is_success, s=150)
        self._children = psutil.Process(self.process.pid).children(recursive=True)

    def gone(self) -> bool:
        """Neither the server nor a process that it had when it was ready runs."""
        return self.process.poll() is not None and not psutil.wait_procs(self._children, 10)[1]

    # ---- workers

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.http.get("/health").json()["workers"]
        return found

    def wait_for_workers(self, number: int = 1) -> None:
        self.wait(lambda: sum(worker["up"] for worker in self.workers()) >= number, s=150)

    # ---- jobs

    def adapt(self, document: str, **body: Any) -> str:
        response = self.http.post("/v1/adaptations", json={"document": document, **body})
        assert response.status_code in (200, 202), response.text
        return str(response.json()["id"])

    def job(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/adaptations/{id}").json()
        return found

    def ended(self, id: str) -> dict[str, Any]:
        """The job, when it has an outcome."""
        self.wait(lambda: self.job(id)["status"] not in ("queued", "running"))
        return self.job(id)

    def events(self, id: str) -> list[dict[str, Any]]:
        """Those until now."""
        page = self.http.get(f"/v1/adaptations/{id}/events", params={"limit": 100}).json()
        found: list[dict[str, Any]] = page["data"]
        return found

    def follow(self, id: str) -> list[dict[str, Any]]:
        """All events, once the job has ended, as the stream tells them; progress is left out."""
        headers = {"Accept": "text/event-stream"}
        text = self.http.get(f"/v1/adaptations/{id}/events", headers=headers).text
        assert text.endswith("data: [DONE]\n\n")
        lines = [line for line in text.splitlines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        return [event for event in events if event["kind"] != "progress"]

    def wait_for_steps(self, id: str, number: int) -> None:
        self.wait(lambda: sum(e["kind"] == "step" for e in self.events(id)) >= number)

    # ---- what it shows and leaves

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels."""
        lines = [x for x in self.http.get("/metrics").text.splitlines() if not x.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def checksum(self, id: str) -> str:
        """Over every bit of an adapter and its manifest."""
        return adapter_checksum(self.data, id)


def adapter_checksum(data: Path, id: str) -> str:
    """What the file of an adapter in the data folder of a server says of all its bits."""
    with safe_open(data / "adapters" / f"{id}.safetensors", framework="pt") as file:
        return str(file.metadata()["sha256"])
