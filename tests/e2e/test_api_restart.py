"""The real server with a real worker, killed and stopped at bad moments. A random tiny model."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.live_server import COMMAND, LiveServer, adapter_checksum

pytestmark = pytest.mark.slow
DOCUMENT = "The canary lives in the third house. " * 20
LONG: dict[str, Any] = {
    "type": "refine", "steps": 12, "patience": 1000,
    "positions": 4, "group_size": 2, "lora_rank": 2,
}  # fmt: skip
ENDLESS = {**LONG, "steps": 1000}
NUM_PROMPTS = 32
LONG_ANSWER = {  # a random model ends some of the texts early, and some late
    "model": "tiny",
    "prompt": [f"{number}" for number in range(NUM_PROMPTS)],
    "max_tokens": 4000,
    "stream": True,
}


@contextmanager
def serving(model: Path, data: Path) -> Iterator[LiveServer]:
    """A server that is ready, and killed where the block ends."""
    with LiveServer(data, "--model", str(model)) as server:
        server.wait_until_ready()
        yield server
        server.process.kill()
        server.process.wait()
        assert server.gone()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "data"


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path, shared_data: Path) -> Iterator[LiveServer]:
    """A server for tests that leave it running, and nothing in it."""
    with serving(tiny_checkpoint, shared_data) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(shared: LiveServer, shared_data: Path) -> str:
    """What `LONG` leaves where nothing goes wrong."""
    id = shared.adapt(DOCUMENT, method=LONG)
    kinds = [event["kind"] for event in shared.follow(id)]
    assert "resumed" not in kinds
    checksum = shared.checksum(id)
    assert shared.http.delete(f"/v1/adaptations/{id}").json()["deleted"]
    return checksum


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ended_goes_on_after_the_last_step(
    tiny_checkpoint: Path, data: Path, undisturbed: str, number: signal.Signals
) -> None:
    with serving(tiny_checkpoint, data) as server:
        running = server.adapt(DOCUMENT, method=LONG)
        queued = server.adapt(DOCUMENT, method={**LONG, "steps": 1}, seed=1)
        server.wait_for_steps(running, 3)
        server.process.send_signal(number)
        code = server.process.wait(timeout=20)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert server.gone()
    with serving(tiny_checkpoint, data) as server:
        events = server.follow(running)
        assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
        kinds = [event["kind"] for event in events]
        assert kinds[:6] == ["queued", "running", "read", "step", "step", "step"]
        assert kinds.count("read") == 1
        restart = kinds.index("requeued")
        reason = "server_stopped" if number == signal.SIGTERM else "server_died"
        assert events[restart]["data"]["reason"] == reason
        assert kinds[restart + 1] == "running"
        assert kinds.count("resumed") == 1
        resumed = kinds.index("resumed")
        done = [e["data"]["step"] for e in events[:resumed] if e["kind"] == "step"]
        assert events[resumed]["data"] == {"step": len(done), "steps": LONG["steps"]}
        steps = [e["data"]["step"] for e in events if e["kind"] == "step"]
        assert steps == list(range(1, LONG["steps"] + 1))  # each of them once
        assert kinds[-1] in ("succeeded", "rejected")
        assert server.follow(queued)[-1]["kind"] in ("succeeded", "rejected")
        job = server.http.get(f"/v1/adaptations/{running}").json()
        assert (job["status"], job["error"]) == (kinds[-1], None)
        asked = {"adaptation": running, "questions": ["Where?"], "focus": False, "max_tokens": 4}
        assert server.http.post("/v1/answers", json=asked).status_code == 200
    assert adapter_checksum(data, running) == undisturbed
    assert not list((data / "adapters" / "progress").rglob("*.*"))


def test_a_stopped_server_answers_first_and_keeps_its_jobs(
    tiny_checkpoint: Path, data: Path
) -> None:
    with serving(tiny_checkpoint, data) as server:
        id = server.adapt(DOCUMENT, method=ENDLESS)
        server.wait_for_steps(id, 1)
        asked = {**LONG_ANSWER, "max_tokens": 60}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=asked, timeout=60) as response:
            lines = response.iter_lines()
            for line in lines:
                if '"finish_reason": null' in line:
                    break
            server.process.send_signal(signal.SIGTERM)
            late = {"document": "x"}
            refused = httpx.post(f"{server.url}/v1/adaptations", json=late, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            rest = [line for line in lines if line]
        assert sum('"finish_reason": null' not in line for line in rest) == 1 + NUM_PROMPTS
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(timeout=20) == 0
        assert server.gone()
    with serving(tiny_checkpoint, data) as server:
        kinds = [event["kind"] for event in server.events(id)]
        assert "requeued" in kinds
        progress = data / "adapters" / "progress"
        assert [p for p in progress.rglob("*.*") if id in p.name]
        job = server.http.post(f"/v1/adaptations/{id}/cancel").json()
        assert job["status"] == "cancelled"
        assert not list(progress.rglob("*.*"))


def test_a_second_signal_ends_at_once(tiny_checkpoint: Path, data: Path) -> None:
    with serving(tiny_checkpoint, data) as server:
        asked = LONG_ANSWER
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=asked, timeout=60) as response:
            lines = response.iter_lines()  # a name keeps the stream open
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            httpx.get(f"{server.url}/health/live", timeout=60)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - began < 20  # the drain would take 30
        assert server.gone()


def test_two_servers_do_not_share_a_journal(
    tiny_checkpoint: Path, shared: LiveServer, shared_data: Path
) -> None:
    command = [*COMMAND, "--model", str(tiny_checkpoint), "--data-dir", str(shared_data)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert "another server is using it" in second.stderr


def test_deleting_leaves_nothing_on_disk_or_in_memory(
    shared: LiveServer, shared_data: Path
) -> None:
    asked = {"document": DOCUMENT, "questions": ["Where?"], "max_tokens": 4}
    reply = shared.http.post("/v1/answers", json=asked).json()
    running = shared.adapt(DOCUMENT, method=ENDLESS)
    shared.wait_for_steps(running, 1)
    held = b"".join(p.read_bytes() for p in shared_data.rglob("*") if p.is_file())
    assert b"canary" in held
    for id in (reply["adaptation"]["id"], running):
        assert shared.http.delete(f"/v1/adaptations/{id}").json()["deleted"]
        files = [p for p in shared_data.rglob("*") if p.is_file()]
        assert not [p for p in files if id in p.name]
    held = b"".join(p.read_bytes() for p in shared_data.rglob("*") if p.is_file())
    assert b"canary" not in held
    text = ""

    def emptied() -> bool:
        nonlocal text
        text = shared.http.get("/metrics").text
        return 'imprint_adapters{tier="host"} 0.0' in text

    shared.wait(emptied)
    assert 'imprint_adapter_bytes{tier="host"} 0.0' in text
    assert 'imprint_adapter_bytes{tier="disk"} 0.0' in text
    assert 'imprint_slots{state="used"} 0.0' in text
    assert "canary" not in text
    assert "canary" not in shared.log.read_text()


def test_short_patience_leaves_no_work_behind(shared: LiveServer) -> None:
    """Many requests whose clients give up; then one that must be answered."""
    asked = {**LONG_ANSWER, "stream": False}
    for _ in range(50):
        with pytest.raises(httpx.ReadTimeout):
            shared.http.post("/v1/completions", json=asked, timeout=0.05)
    short = {**asked, "prompt": "x", "max_tokens": 3}
    reply = shared.http.post("/v1/completions", json=short, timeout=20)
    assert reply.json()["usage"]["completion_tokens"] <= 3
    shared.wait(lambda: shared.http.get("/health").json()["requests"] == 0)
    shared.wait(lambda: 'imprint_slots{state="used"} 0.0' in shared.http.get("/metrics").text)
