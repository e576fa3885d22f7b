"""Adaptations whose worker or server went away: taken up after their last step, or from the start.

An engine stands in for a worker, the fake pool for all of them; `tests/e2e/` kills real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from imprint.adapters.adapter import FORMAT
from imprint.adapters.files import ProgressFolder
from imprint.adapters.verified import file_metadata
from imprint.models import DeltaNet, load_model, load_tokenizer
from imprint.server import messages
from imprint.server.config import Settings
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationBranches,
    AdaptationDone,
    AdaptationEvent,
    AdaptationFailed,
    AdaptationRead,
    AdaptationResumed,
    AdaptationStarted,
    Cancel,
    Evict,
    FromWorker,
    Observation,
    Observations,
)
from imprint.server.worker_config import WorkerConfig

METHOD: dict[str, Any] = {
    "type": "refine", "steps": 4, "positions": 4, "group_size": 2, "lora_rank": 2,
    "learning_rate": 0.05, "probe_confidence": 0.0, "neutral_margin": 100.0, "patience": 9,
}  # fmt: skip
TEXT = "Anna hid the key under the third stone by the well, and nobody but the dog saw it. " * 3


class Worker:
    """An engine whose messages are kept; left alone, it is a worker that was killed."""

    def __init__(self, model: DeltaNet, checkpoint: Path, store: Path) -> None:
        self.sent: list[FromWorker] = []
        self.tokenizer = load_tokenizer(checkpoint)
        config = WorkerConfig(model=str(checkpoint), store=str(store), segment_tokens=32)
        self.engine = Engine(model, self.tokenizer, config, self.sent.append, model_hash="h")
        self.progress = ProgressFolder(store)

    def begin(self, *, attempt: int = 1, **method: Any) -> None:
        tokens = self.tokenizer.encode(TEXT)
        method = {**METHOD, **method}
        self.engine.handle(Adapt(adaptation_id="a", tokens=tokens, method=method, attempt=attempt))

    def run(self, *, until_step: int | None = None) -> list[FromWorker]:
        """To the end of all work, or to a step's event."""
        while until_step is None or until_step not in steps_of(self.sent):
            try:
                if not self.engine.step():
                    break
            except Exception as error:  # what the worker's loop does
                self.engine.fail_unit(error)
        self.engine.flush_observations()
        return self.sent

    def content(self) -> dict[str, str]:
        """The adapter, with the checksum over every bit of it."""
        adapter = self.engine.cache.acquire("a")
        return file_metadata(adapter.to_tensors(), adapter.manifest, FORMAT)

    def checkpoints(self) -> list[str]:
        """What became of each checkpoint, in order."""
        values: list[Observation] = []
        for message in self.sent:
            values += message.values if isinstance(message, Observations) else []
        name = "adaptation_checkpoints_total"
        return [value.labels["outcome"] for value in values if value.name == name]


def branches_of(said: list[FromWorker]) -> list[messages.StepBranches]:
    return [step for m in said if isinstance(m, AdaptationBranches) for step in m.steps]


def steps_of(said: list[FromWorker]) -> list[int]:
    events = [m for m in said if isinstance(m, AdaptationEvent) and m.kind == "step"]
    return [event.data["step"] for event in events]


def outcomes_of(said: list[FromWorker]) -> list[str]:
    return [message.status for message in said if isinstance(message, AdaptationDone)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DeltaNet:
    loaded = load_model(tiny_checkpoint)
    assert isinstance(loaded, DeltaNet)
    return loaded


@pytest.fixture
def make_worker(model: DeltaNet, tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Worker]:
    def make(store: str = "store", other: DeltaNet | None = None) -> Worker:
        return Worker(other or model, tiny_checkpoint, tmp_path / store)

    return make


# ---- the worker's side ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["lora", "query_lora", "state"])
def test_another_worker_goes_on_after_the_last_step(
    make_worker: Callable[..., Worker], scope: str
) -> None:
    whole = make_worker("whole")
    whole.begin(scope=scope)
    events = [m.data for m in whole.run() if isinstance(m, AdaptationEvent) and m.kind == "step"]
    dead = make_worker()
    dead.begin(scope=scope)
    dead.run(until_step=2)
    second = make_worker()
    second.begin(scope=scope, attempt=2)
    said = second.run()
    assert said[:2] == [
        AdaptationStarted(adaptation_id="a", attempt=2),
        AdaptationResumed(adaptation_id="a", step=2, steps=4, events=events[:2]),
    ]
    assert steps_of(said) == [3, 4]
    assert branches_of(said) == branches_of(whole.sent)  # those of all steps, told again
    assert [m for m in said if isinstance(m, AdaptationRead)] == [
        m for m in whole.sent if isinstance(m, AdaptationRead)
    ]
    assert second.content() == whole.content()
    assert second.checkpoints() == ["resumed", "written", "written"]
    # it is the API process that deletes it, once the outcome is written down
    assert second.progress.ids() == ["a"]
    second.engine.handle(Evict(adapter_id="a"))
    assert second.progress.ids() == []
    assert second.engine.scheduler.finish_estimates() == ({}, 0.0)


def test_a_worker_that_dies_between_the_file_and_the_outcome_loses_nothing(
    make_worker: Callable[..., Worker],
) -> None:
    whole = make_worker("whole")
    whole.begin()
    whole.run()
    dead = make_worker()
    dead.begin()
    while not dead.engine.cache.writing:
        dead.engine.step()
    dead.engine.cache.wait(20)
    assert dead.engine.cache.written() == ["a"]
    assert outcomes_of(dead.sent) == []
    second = make_worker()
    second.begin(attempt=2)
    said = second.run()
    assert [m.step for m in said if isinstance(m, AdaptationResumed)] == [4]
    assert steps_of(said) == []
    assert outcomes_of(said) == outcomes_of(whole.sent)
    assert second.content() == whole.content()


def test_a_refused_checkpoint_starts_over(make_worker: Callable[..., Worker]) -> None:
    whole = make_worker("whole")
    whole.begin()
    whole.run()
    dead = make_worker()
    dead.begin()
    dead.run(until_step=3)
    path = dead.progress.steps.path("a")
    path.write_bytes(path.read_bytes()[:100])
    second = make_worker()
    second.begin(attempt=2)
    assert steps_of(second.run()) == [1, 2, 3, 4]
    assert second.content() == whole.content()
    assert second.checkpoints() == ["refused", *["written"] * 5]


def test_a_cancelled_one_keeps_its_checkpoint_until_it_is_written_down(
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker()
    worker.begin()
    worker.run(until_step=1)
    worker.engine.handle(Cancel(id="a"))  # also what a server says that stops
    assert isinstance(worker.sent[-1], AdaptationDone)
    assert worker.progress.ids() == ["a"]


class Narrow(DeltaNet):
    """A model whose memory may run out."""

    longest = 10_000

    def forward(self, tokens_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tokens_BT.shape[1] > self.longest:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(tokens_BT, *args, **kwargs)


def test_halved_segments_begin_again_and_outlive_a_worker(
    model: DeltaNet, make_worker: Callable[..., Worker]
) -> None:
    narrow = Narrow(model.config)
    narrow.load_state_dict(model.state_dict())
    narrow.eval().requires_grad_(False)
    worker = make_worker(other=narrow)
    worker.begin(scope="lora")
    worker.run(until_step=2)
    narrow.longest = 20  # below the segment of 32, above half of it
    worker.sent.clear()
    worker.run(until_step=2)
    assert steps_of(worker.sent) == [1, 2]
    assert not [m for m in worker.sent if isinstance(m, AdaptationResumed)]
    second = make_worker(other=narrow)
    second.begin(scope="lora", attempt=2)
    assert steps_of(second.run()) == [3, 4]
    assert not [m for m in second.sent if isinstance(m, AdaptationFailed)]
    assert second.engine.cache.acquire("a").manifest["config"]["segment_tokens"] == 16


# ---- the API process's side ----------------------------------------------------------------------

PATH = "/v1/adaptations"


async def create(client: httpx.AsyncClient, document: str = "hello") -> str:
    return str((await client.post(PATH, json={"document": document})).json()["id"])


async def events_of(client: httpx.AsyncClient, id: str) -> list[dict[str, Any]]:
    await client.get(f"{PATH}/{id}/events", headers={"Accept": "text/event-stream"})
    found: list[dict[str, Any]] = (await client.get(f"{PATH}/{id}/events")).json()["data"]
    return found


async def given(pool: Any, *ids: str) -> None:
    async with asyncio.timeout(10):
        while not set(ids) <= set(pool.queues):
            await asyncio.sleep(0.005)


def folder_of(settings: Settings, *ids: str) -> ProgressFolder:
    """The checkpoints' folder, with what stands for the checkpoints of these jobs."""
    folder = ProgressFolder(settings.pool_config().worker.store)
    for id in ids:
        folder.begun.write(id, b"begun", durable=False)
        folder.steps.write(id, b"steps", durable=False)
    return folder


def step(id: str, number: int) -> AdaptationEvent:
    data = {"step": number, "steps": 4, "grad_norm": number / 2}
    return AdaptationEvent(adaptation_id=id, kind="step", data=data)


@pytest.mark.anyio
async def test_steps_whose_events_were_lost_are_told_once(
    client: httpx.AsyncClient, pool: Any
) -> None:
    pool.hold = True
    id = await create(client)
    await given(pool, id)
    numbers = [step(id, number).data for number in (1, 2, 3)]
    pool.say(
        id,
        AdaptationStarted(adaptation_id=id, attempt=1),
        step(id, 1),
        messages.AdaptationRequeued(adaptation_id=id, attempt=2, reason="killed"),
        AdaptationStarted(adaptation_id=id, attempt=2),
        AdaptationResumed(adaptation_id=id, step=3, steps=4, events=numbers),
        step(id, 4),
        AdaptationDone(adaptation_id=id, status="succeeded"),
    )
    events = await events_of(client, id)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    told = [(event["kind"], event["data"].get("step")) for event in events[1:-1]]
    assert told == [
        *[("running", None), ("step", 1), ("requeued", None), ("running", None)],
        *[("step", 2), ("step", 3), ("resumed", 3), ("step", 4)],
    ]
    assert events[-3]["data"] == {"step": 3, "steps": 4}
    assert "imprint_adaptation_steps_total 4.0" in (await client.get("/metrics")).text


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", ["succeeded", "rejected", "failed", "cancelled", "deleted"])
async def test_a_checkpoint_is_gone_when_its_job_has_ended(
    client: httpx.AsyncClient, settings: Settings, pool: Any, outcome: str
) -> None:
    pool.hold = True
    id = await create(client)
    await given(pool, id)
    pool.say(id, AdaptationStarted(adaptation_id=id, attempt=1), step(id, 1))
    folder = folder_of(settings, id)
    if outcome == "failed":
        pool.say(id, AdaptationFailed(adaptation_id=id, code="worker_died", message="twice"))
    elif outcome == "cancelled":
        await client.post(f"{PATH}/{id}/cancel")
    elif outcome == "deleted":
        await client.delete(f"{PATH}/{id}")
    else:
        pool.say(id, AdaptationDone(adaptation_id=id, status=outcome))
    async with asyncio.timeout(10):
        while folder.ids():
            await asyncio.sleep(0.005)


@pytest.mark.anyio
async def test_a_stopped_server_keeps_the_checkpoints_of_its_jobs_and_no_others(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    async with serve(settings, pool) as client:
        running, cancelled = await create(client, "a"), await create(client, "b")
        await given(pool, running, cancelled)
        pool.say(running, AdaptationStarted(adaptation_id=running, attempt=1))
        journal = client.app.state.services.journal
        await journal(type(journal._journal).request_cancel, cancelled)
        folder = folder_of(settings, running, cancelled, "adp_of-nobody")
    assert folder.ids() == sorted([running, cancelled, "adp_of-nobody"])
    second = type(pool)()
    second.hold = True
    async with serve(settings, second) as client:
        await given(second, running)
        assert folder.ids() == [running]
