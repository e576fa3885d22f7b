"""What a worker takes on at once, from numbers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from imprint.server.budgets import Budgets, budgets_of, scheduler_config
from imprint.server.config import Settings
from imprint.server.worker_config import WorkerConfig
from imprint.server.worker_memory import host_bytes

GB = 10**9


def found(free_bytes: int | None, job_bytes: int = GB, **settings: Any) -> Budgets:
    config = WorkerConfig(model="m", store="s", **settings)
    return budgets_of(config, free_bytes=free_bytes, host_bytes=80 * GB, job_bytes=job_bytes)


def test_a_cpu_has_the_measured_constants() -> None:
    assert found(None) == found(None, job_bytes=1) == Budgets(
        adaptation_bytes=4 << 30,
        adapter_device_bytes=0,
        adapter_host_bytes=10 * GB,
        max_running_adaptations=8,
        max_batched_adaptations=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("free_gb", "job_bytes", "together"),
    [(70, GB, 42), (10, GB, 6), (1, GB, 1), (70, 10**6, 64), (0, GB, 1)],
)
def test_a_gpu_shares_what_it_has_free(free_gb: int, job_bytes: int, together: int) -> None:
    budgets = found(free_gb * GB, job_bytes)
    assert budgets.adaptation_bytes == max(1, free_gb * 6 * GB // 10)
    assert budgets.adapter_device_bytes == free_gb * 2 * GB // 10
    assert budgets.max_running_adaptations == budgets.max_batched_adaptations == together


@pytest.mark.parametrize("free_bytes", [None, 10 * GB])
def test_what_is_set_holds(free_bytes: int | None) -> None:
    settings = {
        "adaptation_bytes": 5, "max_running_adaptations": 3, "max_batched_adaptations": 2,
    }  # fmt: skip
    budgets = found(free_bytes, adapter_device_bytes=7, **settings)
    assert budgets.adapter_device_bytes == (7 if free_bytes else 0)
    assert {name: getattr(budgets, name) for name in settings} == settings
    config = WorkerConfig(model="m", store="s", num_slots=9)
    scheduler = scheduler_config(config, budgets)
    assert {name: getattr(scheduler, name) for name in settings} == settings
    assert scheduler.num_slots == 9


def test_what_is_set_leaves_the_other_what_remains() -> None:
    assert found(10 * GB, adaptation_bytes=7 * GB).adapter_device_bytes == GB
    assert found(10 * GB, adaptation_bytes=9 * GB).adapter_device_bytes == 0
    assert found(10 * GB, adapter_device_bytes=6 * GB).adaptation_bytes == 2 * GB
    many = found(10 * GB, adaptation_bytes=3 * GB)
    assert (many.max_running_adaptations, many.adapter_device_bytes) == (3, 2 * GB)


def test_workers_share_an_eighth_of_their_machines_memory() -> None:
    alone, one_of_four = Settings().pool_config(), Settings(workers=4).pool_config()
    for pool, wanted in ((alone, 10 * GB), (one_of_four, 25 * GB // 10)):
        budgets = budgets_of(pool.worker, free_bytes=None, host_bytes=80 * GB, job_bytes=GB)
        assert budgets.adapter_host_bytes == wanted
    assert found(None, adapter_host_bytes=0, host_share=0.25).adapter_host_bytes == 0
    assert found(10 * GB, adapter_host_bytes=7).adapter_host_bytes == 7


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ((), None),
        (("max\n",), None),
        (("2097152\n",), 2 << 20),
        (("max\n", "9223372036854771712\n"), None),
        (("4194304\n", "2097152\n"), 2 << 20),
    ],
)
def test_a_container_has_the_memory_it_may_use(
    tmp_path: Path, texts: tuple[str, ...], wanted: int | None
) -> None:
    limits = [tmp_path / "absent", *(tmp_path / str(i) for i in range(len(texts)))]
    for path, text in zip(limits[1:], texts, strict=True):
        path.write_text(text)
    assert host_bytes(limits) == (wanted or psutil.virtual_memory().total)


def test_a_second_tier_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValidationError, match="set adapter_host_bytes"):
        Settings(adapter_device_bytes=5)
    assert Settings(device="cuda", adapter_device_bytes=5).pool_config().worker.device == "cuda"
