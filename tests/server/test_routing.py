"""Which worker gets what: adapters at hand, free memory, queues; and estimates of the end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from imprint.server import routing
from imprint.server.launching import LocalLauncher
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    Generate,
    Heartbeat,
    Prompt,
    Ready,
    WorkerStats,
)
from imprint.server.ray_launching import RayLauncher
from imprint.server.routing import Residency
from imprint.server.work_table import Work, WorkTable
from imprint.server.worker_config import PoolConfig, WorkerConfig
from imprint.server.worker_process import WorkerProcess

CONFIG = PoolConfig(worker=WorkerConfig(model="m", store="s"), num_workers=3)
READY = Ready(
    pid=1, model="m", model_hash="h", num_parameters=1, state_bytes=1, num_slots=2, max_tokens=9,
    device="cpu", dtype="float32",
)  # fmt: skip
GIB = 2**30


def beat(**stats: Any) -> Heartbeat:
    return Heartbeat(time=0.0, stats=WorkerStats(**stats))


@pytest.fixture
def workers() -> list[WorkerProcess]:
    workers = [WorkerProcess(name, CONFIG) for name in ("a", "b", "c")]
    for worker in workers:
        worker.heard(READY)
    return workers


@pytest.fixture
def table(workers: list[WorkerProcess]) -> WorkTable:
    return WorkTable(CONFIG, workers)


def ask(table: WorkTable, id: str, adapter: str | None, num_prompts: int = 1) -> str | None:
    prompts = [Prompt(sequence_id=str(i), tokens=[1]) for i in range(num_prompts)]
    message = Generate(request_id=id, prompts=prompts, adapter_id=adapter)
    return put(table, table.add(message, lambda: None))


def study(table: WorkTable, id: str, num_tokens: int = 1) -> str | None:
    message = Adapt(adaptation_id=id, tokens=[1] * num_tokens, method={"type": "read"})
    return put(table, table.add(message, lambda: None))


def put(table: WorkTable, work: Work) -> str | None:
    worker = table.choose(work.message)
    if worker is not None:
        table.place(work, worker)
    return worker.name if worker else None


def finish(table: WorkTable, id: str, status: str = "succeeded") -> None:
    work = table.get(id)
    assert work is not None
    assert work.worker is not None
    table.route(work.worker, AdaptationDone(adaptation_id=id, status=status))


def test_questions_go_where_the_adapter_is_until_its_slots_are_taken(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    assert [study(table, id) for id in ("x", "y")] == ["a", "b"]
    finish(table, "x")
    finish(table, "y", "rejected")  # asked as well
    assert [ask(table, str(i), "y") for i in range(2)] == ["b", "b"]
    assert ask(table, "2", "y") == "a"  # b has two slots
    assert ask(table, "3", "y") == "a"  # who has loaded it now
    assert ask(table, "4", "x") == "c"
    table.orphan(workers[2], "killed")
    assert not table.residency.holds("c", "x")
    table.residency.forget_adapter("y")
    assert not any(table.residency.holds(worker, "y") for worker in "ab")


def test_a_cancelled_adaptation_leaves_no_adapter(table: WorkTable) -> None:
    assert study(table, "x") == "a"
    finish(table, "x", "cancelled")
    assert not table.residency.holds("a", "x")


def test_documents_go_where_memory_is_free_then_to_the_shortest_queue(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    for worker, used in zip(workers, (2 * GIB, 1000, 0), strict=True):
        worker.heard(beat(adaptation_bytes=used, adaptation_capacity_bytes=4 * GIB))
    assert [study(table, str(i)) for i in range(3)] == ["b", "c", "b"]  # a kilobyte is no reason
    workers[1].heard(beat(adaptation_bytes=4 * GIB, adaptation_capacity_bytes=4 * GIB))
    workers[2].heard(beat(adaptation_bytes=3 * GIB, adaptation_capacity_bytes=4 * GIB))
    assert study(table, "3") == "a"


def test_adapters_that_nobody_holds_are_loaded_where_there_is_room(
    table: WorkTable, workers: list[WorkerProcess]
) -> None:
    for worker, used in zip(workers, (GIB, 0, GIB // 2), strict=True):
        tiers = {"host": used, "disk": 9 * GIB}
        worker.heard(beat(adapter_bytes=tiers, adapter_capacity_bytes={"host": GIB}))
    assert ask(table, "0", "x") == "b"
    workers[1].ready = None
    assert ask(table, "1", "x") == "c"


def test_what_is_known_of_a_worker_is_bounded() -> None:
    residency = Residency()
    for number in range(routing.MAX_KNOWN + 1):
        residency.note("a", str(number))
    assert not residency.holds("a", "0")
    assert residency.holds("a", "1")


def test_estimates_reach_beyond_the_workers_windows(workers: list[WorkerProcess]) -> None:
    narrow = msgspec.structs.replace(CONFIG, worker_window=1)
    table = WorkTable(narrow, workers)
    assert [study(table, id, 100) for id in "xyz"] == ["a", "b", "c"]
    assert study(table, "waits", 150) is None
    assert study(table, "last", 300) is None
    assert table.finish_s("waits") is None  # nobody can tell yet
    assert table.backlog_s() == 0
    for worker, id in zip(workers, "xyz", strict=True):
        worker.heard(beat(adaptation_finish_s={id: 2.0}, backlog_s=2.0))
    assert table.finish_s("x") == 2.0
    # 6 s for 300 tokens at the workers; three of them share what waits
    assert table.finish_s("waits") == pytest.approx((6 + 3) / 3)
    assert table.finish_s("last") == pytest.approx((6 + 9) / 3)
    assert table.backlog_s() == pytest.approx(5.0)
    assert table.finish_s("unknown") is None


def test_each_gpu_has_a_worker_of_its_own() -> None:
    here, cluster = LocalLauncher(), RayLauncher("auto")
    assert [here.device("cuda", i, 2) for i in range(2)] == ["cuda:0", "cuda:1"]
    assert here.device("cuda", 0, 1) == "cuda"
    assert [here.device("cpu", i, 2) for i in range(2)] == ["cpu", "cpu"]
    assert [cluster.device("cuda", i, 2) for i in range(2)] == ["cuda", "cuda"]
