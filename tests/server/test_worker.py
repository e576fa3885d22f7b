"""One worker process over its socket: how it starts, sleeps, stops and dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from imprint.adapters import faults
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationStarted,
    Cancel,
    Drain,
    FromWorker,
    Generate,
    Generated,
    Heartbeat,
    Observations,
    Prompt,
    Ready,
    RequestFailed,
    SequenceDone,
    TokenDelta,
    ToWorker,
    decode_from_worker,
    encode,
)
from imprint.server.worker import last_words, load_engine
from imprint.server.worker_config import WorkerConfig, WorkerStart

LONG = {"type": "refine", "steps": 1000, "patience": 1000, "positions": 4, "lora_rank": 2}
ANSWER = Generate(request_id="r", prompts=[Prompt(sequence_id="s", tokens=[5])], max_tokens=100)
READING = Prompt(sequence_id="s", tokens=[5] * 500_000)
"""A prompt that takes much longer than any test."""


class Peer:
    """The other end of a worker's socket, and the worker."""

    def __init__(
        self, checkpoint: Path, folder: Path, *, plan: str = "", **changes: object
    ) -> None:
        """`plan`: the worker's faults."""
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.store = folder / "store"
        self.store.mkdir()
        endpoint = f"ipc://{folder}/pool"
        self.socket.bind(endpoint)
        worker = WorkerConfig(
            model=str(checkpoint), store=str(self.store), heartbeat_interval_s=0.1,
            **changes,  # type: ignore[arg-type]
        )  # fmt: skip
        start = WorkerStart(
            worker=worker, endpoint=endpoint, identity="worker-0.1", parent_pid=os.getpid()
        )
        command = [sys.executable, "-m", "imprint.server.worker", msgspec.json.encode(start)]
        environ = os.environ | ({faults.VARIABLE: plan} if plan else {})
        self.process = subprocess.Popen(command, env=environ)

    def send(self, message: ToWorker) -> None:
        self.socket.send_multipart([b"worker-0.1", encode(message)])

    def receive(self) -> FromWorker:
        assert self.socket.poll(30_000), "the worker is silent"
        return decode_from_worker(self.socket.recv_multipart()[1])

    def until(self, kind: type) -> FromWorker:
        """The first message of this kind, or part of a batch; what came before it is dropped."""
        while True:
            message = self.receive()
            for said in message.values if isinstance(message, Generated) else [message]:
                if isinstance(said, kind):
                    return said

    def read_for_ever(self) -> None:
        """Returns when the worker is at it."""
        self.send(Generate(request_id="r", prompts=[READING]))
        beat = self.until(Heartbeat)
        while not (isinstance(beat, Heartbeat) and beat.stats.slots_used):
            beat = self.until(Heartbeat)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()
        self.context.term()


@pytest.fixture
def peer(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tiny_checkpoint, tmp_path, drain_timeout_s=1.0)
    yield peer
    peer.close()


def test_a_worker_says_ready_then_beats_and_sleeps_between(peer: Peer) -> None:
    ready = peer.receive()
    assert isinstance(ready, Ready)
    assert ready.pid == peer.process.pid
    assert ready.num_parameters > 0
    process = psutil.Process(ready.pid)
    peer.until(Heartbeat)
    before = sum(process.cpu_times()[:2])
    for _ in range(10):
        peer.until(Heartbeat)
    assert sum(process.cpu_times()[:2]) - before < 0.2  # of at least a second


def test_heartbeats_go_on_between_quanta_and_a_drain_stops_a_study(peer: Peer) -> None:
    peer.until(Ready)
    peer.send(Adapt(adaptation_id="a", tokens=[5] * 400, method=LONG))
    peer.until(AdaptationStarted)
    beat = peer.until(Heartbeat)
    while not (isinstance(beat, Heartbeat) and beat.stats.adaptation_finish_s):
        beat = peer.until(Heartbeat)
    assert beat.stats.adaptations_running == 1
    assert beat.stats.backlog_s > 0
    names = {value.name for value in peer.until(Observations).values}
    assert "quantum_duration_seconds" in names
    peer.send(Drain())
    assert peer.process.wait(10) == 0


def test_nobody_hears_of_an_adapter_that_the_disk_does_not_have(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Here it never will; answers decode meanwhile."""
    peer = Peer(tiny_checkpoint, tmp_path, plan="api/artefact_rename=hang")
    try:
        peer.until(Ready)
        peer.send(Adapt(adaptation_id="a", tokens=[5] * 40, method={"type": "read"}))
        while not list(peer.store.glob("a.*.partial")):
            peer.until(Heartbeat)
        peer.send(Cancel(id="a"))
        peer.send(ANSWER)
        peer.send(Drain())
        heard: list[FromWorker] = []
        while not any(isinstance(message, SequenceDone) for message in heard):
            message = peer.receive()
            heard += message.values if isinstance(message, Generated) else [message]
        while not isinstance(heard[-1], Heartbeat):
            heard.append(peer.receive())
        assert not any(isinstance(message, AdaptationDone) for message in heard)
        assert peer.process.poll() is None  # it does not leave before the disk has it
    finally:
        peer.close()


def test_sigterm_lets_an_answer_finish(peer: Peer) -> None:
    peer.until(Ready)
    peer.send(ANSWER)
    peer.until(TokenDelta)
    peer.process.send_signal(signal.SIGTERM)
    peer.until(SequenceDone)
    assert peer.process.wait(10) == 0


def test_a_drain_that_takes_too_long_ends_answers_clearly(peer: Peer) -> None:
    peer.until(Ready)
    peer.read_for_ever()
    began = time.monotonic()
    peer.process.send_signal(signal.SIGTERM)
    failed = peer.until(RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert failed.code == "draining"
    assert peer.process.wait(10) == 0
    assert time.monotonic() - began >= 1.0


def test_a_second_sigterm_aborts(peer: Peer) -> None:
    peer.until(Ready)
    peer.read_for_ever()
    peer.process.send_signal(signal.SIGTERM)
    peer.until(Heartbeat)  # two signals sent at once may arrive as one
    peer.process.send_signal(signal.SIGTERM)
    assert peer.process.wait(10) == 1


def test_a_broken_job_does_not_end_the_worker(peer: Peer) -> None:
    peer.until(Ready)
    (peer.store / "b.safetensors").mkdir()
    peer.send(Adapt(adaptation_id="b", tokens=[5] * 40, method={"type": "read"}))
    peer.send(Adapt(adaptation_id="c", tokens=[5] * 40, method={"type": "read"}))
    done = peer.until(AdaptationDone)
    assert isinstance(done, AdaptationDone)
    assert done.adaptation_id == "c"


def test_a_worker_does_not_start_without_the_store_or_the_device(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for number, (store, device, status) in enumerate(
        [(tmp_path / "away", "cpu", 74), (tmp_path, "cuda:99", 78)]
    ):
        worker = WorkerConfig(model=str(tiny_checkpoint), store=str(store), device=device)
        start = WorkerStart(
            worker=worker,
            endpoint=f"ipc://{tmp_path}/{number}",
            identity="w",
            parent_pid=os.getpid(),
        )
        command = [sys.executable, "-m", "imprint.server.worker", msgspec.json.encode(start)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == status
        reason = "the store's folder is not there" if status == 74 else "there is no cuda:99"
        assert reason in ended.stderr
    assert not (tmp_path / "away").exists()


def test_a_worker_that_leaves_says_whether_its_weights_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = WorkerConfig(model=str(tiny_checkpoint), store=str(tmp_path / "store"))
    engine, _ = load_engine(config, lambda message: None)
    with caplog.at_level("INFO"):
        assert last_words(engine) == 0
        weight = next(engine._around.model.parameters())
        weight.data.view(-1)[7] += 1e-3
        assert last_words(engine) == 1
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "the base weights are as they were loaded"
    assert said[1].startswith("the base weights are not as they were loaded")


def test_a_worker_dies_with_its_parent(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    worker = WorkerConfig(model=str(tiny_checkpoint), store=str(tmp_path / "store"))
    script = f"""
import os, subprocess, sys, time, msgspec
from imprint.server.worker_config import WorkerConfig, WorkerStart
worker = msgspec.json.decode({msgspec.json.encode(worker)!r}, type=WorkerConfig)
start = WorkerStart(
    worker=worker, endpoint="ipc://{tmp_path}/pool", identity="w", parent_pid=os.getpid()
)
command = [sys.executable, "-m", "imprint.server.worker", msgspec.json.encode(start)]
print(subprocess.Popen(command).pid, flush=True)
time.sleep(60)
"""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{tmp_path}/pool")
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert socket.poll(30_000)  # it stands
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    socket.close()
    context.term()
