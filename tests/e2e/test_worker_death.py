"""kill -9 of the worker in the middle of things: the API stays up, and the work is done anyway."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from imprint.server.client import Adaptation, ImprintClient
from imprint.server.commands.local_server import local_server
from imprint.server.config import Settings
from support.live_server import adapter_checksum

pytestmark = pytest.mark.slow
DOCUMENT = "The canary lives in the third house, and its number is 4711. " * 8
STUDY = {"type": "refine", "steps": 12, "patience": 1000, "positions": 4, "lora_rank": 2}


@pytest.fixture
def settings(tiny_checkpoint: Path, tmp_path: Path) -> Settings:
    return Settings(model=tiny_checkpoint, data_dir=tmp_path / "data", segment_tokens=64)


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    with local_server(settings) as url:
        yield url


def kill_worker() -> None:
    # Other tests of this process may have left helpers of the interpreter running.
    children = psutil.Process().children()
    (worker,) = (child for child in children if "imprint.server.worker" in child.cmdline())
    os.kill(worker.pid, signal.SIGKILL)


def test_a_study_survives_its_worker(url: str, settings: Settings, tmp_path: Path) -> None:
    stop, statuses = threading.Event(), set()

    def watch() -> None:
        with httpx.Client(base_url=url) as http:
            while not stop.wait(0.05):
                statuses.add(http.get("/health/live").status_code)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        events, job = _study_and_kill_after(url, num_steps=3)
    finally:
        stop.set()
        watcher.join()
    assert statuses == {200}
    assert job.status in ("succeeded", "rejected")
    kinds = [kind for kind, _ in events]
    requeued = kinds.index("requeued")
    assert kinds.count("requeued") == 1
    assert events[requeued][1]["reason"] == "killed"
    assert kinds[requeued + 1] == "running"
    assert kinds.count("resumed") == 1
    resumed = kinds.index("resumed")
    assert events[resumed][1] == {"step": kinds[:resumed].count("step"), "steps": STUDY["steps"]}
    steps = [data for kind, data in events if kind == "step"]
    assert [data["step"] for data in steps] == list(
        range(1, STUDY["steps"] + 1)
    )  # each of them once
    with httpx.Client(base_url=url, timeout=60) as http:
        assert 'worker_restarts_total{reason="killed"} 1.0' in http.get("/metrics").text
        body = {"adaptation": job.id, "questions": ["Who?"], "focus": False, "max_tokens": 4}
        assert http.post("/v1/answers", json=body).status_code == 200
        resumed_once = 'adaptation_checkpoints_total{outcome="resumed"} 1.0'
        deadline = time.monotonic() + 30  # a worker says what it has counted once a second
        while resumed_once not in http.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not list((settings.data_dir / "adapters" / "progress").rglob("*.*"))
    undisturbed = settings.model_copy(update={"data_dir": tmp_path / "undisturbed"})
    with local_server(undisturbed) as other, ImprintClient(other) as client:
        again = client.wait(client.adapt(DOCUMENT, method=STUDY).id)
        assert again.status == job.status
        right = adapter_checksum(undisturbed.data_dir, again.id)
    assert adapter_checksum(settings.data_dir, job.id) == right


def _study_and_kill_after(
    url: str, num_steps: int
) -> tuple[list[tuple[str, dict[str, Any]]], Adaptation]:
    events: list[tuple[str, dict[str, Any]]] = []
    with ImprintClient(url) as client:
        job = client.adapt(DOCUMENT, method=STUDY)
        for event in client.events(job.id):
            if event.kind == "progress":
                continue
            events.append((event.kind, event.data))
            num_seen = sum(kind == "step" for kind, _ in events)
            if event.kind == "step" and num_seen == num_steps:
                kill_worker()
        return events, client.wait(job.id)


def test_an_answer_that_dies_with_its_worker_may_be_asked_again(url: str) -> None:
    prompts = [f"{number}" for number in range(32)]  # some of the texts are long
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 4000, "stream": True}
    with httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            chunks = (
                json.loads(line.removeprefix("data: "))
                for line in response.iter_lines()
                if line.startswith("data: {")
            )
            for _ in range(100):  # text has been shown: the server must not begin again by itself
                assert "error" not in next(chunks)
            kill_worker()
            *_, last = chunks
        assert last["error"]["code"] == "worker_died"
        short = {"model": "tiny", "prompt": "again", "max_tokens": 4}
        assert http.post("/v1/completions", json=short).status_code == 200
