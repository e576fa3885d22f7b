"""Where work goes, and what the death of a worker does to it. No processes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    AdaptationRequeued,
    AdaptationStarted,
    Generate,
    Prompt,
    Ready,
    RequestFailed,
    SequenceDone,
)
from imprint.server.work_table import MAX_WAITING_DEATHS, Work, WorkTable
from imprint.server.worker_config import PoolConfig, WorkerConfig
from imprint.server.worker_process import WorkerProcess

CONFIG = PoolConfig(worker=WorkerConfig(model="m", store="s"), num_workers=2, worker_window=2)
READY = Ready(
    pid=1, model="m", model_hash="h", num_parameters=1, state_bytes=1, num_slots=1, max_tokens=1,
    device="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture
def workers() -> list[WorkerProcess]:
    workers = [WorkerProcess(name, CONFIG) for name in ("a", "b")]
    for worker in workers:
        worker.heard(READY)
    return workers


@pytest.fixture
def table(workers: list[WorkerProcess]) -> WorkTable:
    return WorkTable(CONFIG, workers)


def adapt(table: WorkTable, id: str, **fields: Any) -> Work:
    message = Adapt(adaptation_id=id, tokens=[1], method={"type": "read"}, **fields)
    return table.add(message, lambda: None)


def place(table: WorkTable, work: Work) -> str | None:
    work.worker = table.choose(work.message)
    return work.worker.name if work.worker else None


def said(work: Work) -> list[Any]:
    queue = work.stream._queue
    return [queue.get_nowait() for _ in range(queue.qsize())]


def test_work_goes_to_the_least_busy_worker_within_its_window(table: WorkTable) -> None:
    places = [place(table, adapt(table, str(i))) for i in range(5)]
    assert places == ["a", "b", "a", "b", None]
    generate = Generate(request_id="r", prompts=[Prompt(sequence_id="s", tokens=[1])])
    assert place(table, table.add(generate, lambda: None)) == "a"
    assert [work.id for work in table.held()] == ["4"]


def test_nothing_goes_to_a_worker_that_is_not_up(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    workers[0].ready = None
    assert place(table, adapt(table, "1")) == "b"
    workers[1].ready = None
    assert place(table, adapt(table, "2")) is None


def test_a_suspect_is_studied_alone(table: WorkTable) -> None:
    suspect = adapt(table, "suspect", attempt=2)
    other = adapt(table, "other")
    assert place(table, other) == "a"
    assert place(table, suspect) == "b"
    assert place(table, adapt(table, "third")) == "a"
    assert place(table, adapt(table, "fourth")) is None


def test_a_death_costs_what_had_begun_an_attempt(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    begun, waiting = adapt(table, "begun"), adapt(table, "waiting")
    for death in range(1, MAX_WAITING_DEATHS + 1):
        begun.worker = waiting.worker = workers[0]
        table.route(workers[0], AdaptationStarted(adaptation_id="begun", attempt=death))
        table.orphan(workers[0], "killed")
        if death == 1:
            assert said(begun)[-1] == AdaptationRequeued(
                adaptation_id="begun", attempt=2, reason="killed"
            )
            assert begun in table.held()
        if death == 2:
            failed = said(begun)[-1]
            assert isinstance(failed, AdaptationFailed)
            assert failed.code == "worker_died"
            assert table.get("begun") is None
        if death < MAX_WAITING_DEATHS:
            assert said(waiting) == []
            assert waiting.message.attempt == 1  # type: ignore[union-attr]
    assert [message.attempt for message in said(waiting)] == [2]  # a suspect in the end


def test_cancelled_work_is_not_brought_back(table: WorkTable, workers: list[WorkerProcess]) -> None:
    work = adapt(table, "a")
    work.worker, work.started, work.cancelled = workers[0], True, True
    table.orphan(workers[0], "killed")
    assert said(work) == [AdaptationDone(adaptation_id="a", status="cancelled")]
    assert table.all() == []


def test_messages_of_a_worker_that_lost_the_work_are_dropped(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    work = adapt(table, "a")
    work.worker = workers[1]
    done = AdaptationDone(adaptation_id="a", status="succeeded")
    assert table.route(workers[0], done) is None
    assert table.route(workers[1], done) is work
    assert table.route(workers[1], done) is None
    assert said(work) == [done]


def test_a_request_ends_with_its_last_sequence(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    prompts = [Prompt(sequence_id=id, tokens=[1]) for id in "st"]
    work = table.add(Generate(request_id="r", prompts=prompts), lambda: None)
    work.worker = workers[0]
    for id in "st":
        done = SequenceDone(request_id="r", sequence_id=id, finish_reason="stop")
        assert (table.route(workers[0], done) is work) == (id == "t")
    assert len(said(work)) == 2


def test_time_goes_on_while_work_is_held(table: WorkTable) -> None:
    generate = Generate(
        request_id="r", prompts=[Prompt(sequence_id="s", tokens=[1])], timeout_s=0.01
    )
    work, patient = table.add(generate, lambda: None), adapt(table, "a", timeout_s=100.0)
    time.sleep(0.02)
    left_s = patient.with_time_left().timeout_s
    assert left_s is not None
    assert 99 < left_s < 100
    table.expire()
    (failed,) = said(work)
    assert isinstance(failed, RequestFailed)
    assert (failed.code, failed.phase) == ("deadline_exceeded", "queue")
    assert table.all() == [patient]


def test_a_closed_stream_says_nothing_and_closes_once(table: WorkTable) -> None:
    calls = []
    message = Adapt(adaptation_id="a", tokens=[1], method={"type": "read"})
    work = table.add(message, lambda: calls.append("closed"))

    async def close() -> None:
        await work.stream.aclose()
        await work.stream.aclose()

    asyncio.run(close())
    table.cancel(work)
    assert calls == ["closed"]
    assert said(work) == []
