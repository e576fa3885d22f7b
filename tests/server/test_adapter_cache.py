"""Adapters in memory and on disk: bounded by bytes, loaded beside other work, gone when evicted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore
from imprint.models import RecurrentState
from imprint.server.adapter_cache import AdapterCache
from imprint.server.messages import Observation


class SlowStore(AdapterStore):
    """A store whose disk waits until it is told to go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go_on = threading.Event()
        self.num_loads = 0

    def load(self, adapter_id: str) -> Adapter:
        self.num_loads += 1
        assert self.go_on.wait(20)
        return super().load(adapter_id)


def adapter_of(value: float) -> Adapter:
    return Adapter(
        tokens_T=torch.arange(4),
        entropy_T=torch.zeros(4),
        state=RecurrentState(({"S": torch.full((1, 2, 3), value)},)),
        manifest={"value": value},
    )


NBYTES = adapter_of(0.0).nbytes


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path)


@pytest.fixture
def counted() -> list[tuple[str, str | None]]:
    return []


@pytest.fixture
def make_cache(
    store: SlowStore, counted: list[tuple[str, str | None]]
) -> Callable[[int], AdapterCache]:
    def observe(observation: Observation) -> None:
        counted.append((observation.name, observation.labels.get("tier")))

    return lambda capacity: AdapterCache(store, capacity, observe)


def test_the_least_recently_used_leave_memory_first(
    make_cache: Callable[[int], AdapterCache],
    store: SlowStore,
    counted: list[tuple[str, str | None]],
) -> None:
    cache = make_cache(2 * NBYTES)
    store.go_on.set()
    for number, name in enumerate("abc"):
        cache.put(name, adapter_of(float(number)))
    assert cache.sizes()[0] == {"host": 2, "disk": 3}
    assert cache.sizes()[1]["host"] == 2 * NBYTES
    assert cache.get("b").manifest["value"] == 1  # now c is the oldest
    assert cache.get("a").manifest["value"] == 0
    assert (cache.request("b"), cache.request("a")) == (True, True)
    assert counted == [
        ("adapter_evictions_total", "host"),
        ("adapter_hits_total", "host"),
        ("adapter_hits_total", "disk"),
        ("adapter_evictions_total", "host"),
    ]
    with pytest.raises(KeyError):
        cache.get("nobody")
    with pytest.raises(ValueError, match="must be letters"):
        cache.get("../nobody")


def test_a_load_goes_on_beside_other_work(
    make_cache: Callable[[int], AdapterCache], store: SlowStore
) -> None:
    make_cache(0).put("a", adapter_of(7.0))
    cache = make_cache(2 * NBYTES)
    assert not cache.request("a")
    assert not cache.request("a")
    cache.put("b", adapter_of(8.0))  # the caller is not held up
    assert cache.request("b")
    store.go_on.set()
    cache.wait(20)
    assert cache.request("a")
    assert cache.get("a").manifest["value"] == 7
    assert store.num_loads == 1
    cache.wait(20)  # nothing to wait for


def test_what_is_evicted_while_it_is_loaded_does_not_come_back(
    make_cache: Callable[[int], AdapterCache], store: SlowStore
) -> None:
    make_cache(0).put("a", adapter_of(7.0))
    cache = make_cache(2 * NBYTES)
    cache.request("a")
    threading.Timer(0.05, store.go_on.set).start()
    cache.evict("a")
    assert cache.sizes() == ({"host": 0, "disk": 0}, {"host": 0, "disk": 0})
    with pytest.raises(KeyError):
        cache.get("a")


def test_a_load_that_nobody_waits_for_any_more_is_counted_as_memory(
    make_cache: Callable[[int], AdapterCache], store: SlowStore
) -> None:
    make_cache(0).put("a", adapter_of(7.0))
    cache = make_cache(2 * NBYTES)
    cache.request("a")
    cache.request("nobody")
    store.go_on.set()
    while not (cache.request("a") and cache.request("nobody")):
        cache.wait(20)
    assert cache.sizes()[1]["host"] == NBYTES
