"""Adapters in tiers: bounded by bytes, pinned while in use, loaded beside other work, gone when
evicted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore
from imprint.models import LoraDelta, RecurrentState
from imprint.server.adapter_cache import AdapterCache
from imprint.server.adapter_tiers import IdleStates, Tier, tiers_of
from imprint.server.idle_states import PackedAdapter
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


MakeCache = Callable[..., AdapterCache]
CPU = torch.device("cpu")
NBYTES = adapter_of(0.0).nbytes


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path)


@pytest.fixture
def counted() -> list[tuple[str, str | None]]:
    return []


@pytest.fixture
def make_cache(store: SlowStore, counted: list[tuple[str, str | None]]) -> MakeCache:
    def observe(observation: Observation) -> None:
        counted.append((observation.name, observation.labels.get("tier")))

    def make(host: int, device: int | None = None, idle: IdleStates = "exact") -> AdapterCache:
        """One tier, as on a CPU, or, with bytes of a device, two, both in this machine's memory."""
        tiers = [Tier("host", CPU, host, idle)]
        if device is not None:
            tiers.insert(0, Tier("device", CPU, device))
        return AdapterCache(store, tiers, observe)

    return make


def put(cache: AdapterCache, adapter_id: str, adapter: Adapter) -> None:
    """As the end of a study does, once the disk has taken it."""
    cache.put(adapter_id, adapter)
    cache.confirm(adapter_id)


def use(cache: AdapterCache, adapter_id: str) -> Adapter:
    """As a request does that is over at once."""
    adapter = cache.acquire(adapter_id)
    cache.release(adapter_id)
    return adapter


def test_the_least_recently_used_leave_memory_first(
    make_cache: MakeCache,
    store: SlowStore,
    counted: list[tuple[str, str | None]],
) -> None:
    cache = make_cache(2 * NBYTES)
    store.go_on.set()
    for number, name in enumerate("abc"):
        put(cache, name, adapter_of(float(number)))
    assert cache.sizes()[0] == {"host": 2, "disk": 3}
    assert cache.sizes()[1]["host"] == 2 * NBYTES
    assert use(cache, "b").manifest["value"] == 1  # now c is the oldest
    assert use(cache, "a").manifest["value"] == 0
    assert (cache.request("b"), cache.request("a")) == (True, True)
    assert counted == [
        ("adapter_evictions_total", "host"),
        ("adapter_hits_total", "host"),
        ("adapter_hits_total", "disk"),
        ("adapter_evictions_total", "host"),
    ]
    with pytest.raises(KeyError):
        use(cache, "nobody")
    with pytest.raises(ValueError, match="must be letters"):
        use(cache, "../nobody")


def test_a_load_goes_on_beside_other_work(make_cache: MakeCache, store: SlowStore) -> None:
    put(make_cache(0), "a", adapter_of(7.0))
    cache = make_cache(2 * NBYTES)
    assert not cache.request("a")
    assert not cache.request("a")
    put(cache, "b", adapter_of(8.0))  # the caller is not held up
    assert cache.request("b")
    store.go_on.set()
    cache.wait(20)
    assert cache.request("a")
    assert use(cache, "a").manifest["value"] == 7
    assert store.num_loads == 1
    cache.wait(20)  # nothing to wait for


def test_what_is_evicted_while_it_is_loaded_does_not_come_back(
    make_cache: MakeCache, store: SlowStore
) -> None:
    put(make_cache(0), "a", adapter_of(7.0))
    cache = make_cache(2 * NBYTES)
    cache.request("a")
    threading.Timer(0.05, store.go_on.set).start()
    cache.evict("a")
    assert cache.sizes() == ({"host": 0, "disk": 0}, {"host": 0, "disk": 0})
    with pytest.raises(KeyError):
        use(cache, "a")


def test_a_load_that_nobody_waits_for_any_more_is_counted_as_memory(
    make_cache: MakeCache, store: SlowStore
) -> None:
    put(make_cache(0), "a", adapter_of(7.0))
    cache = make_cache(2 * NBYTES)
    cache.request("a")
    cache.request("nobody")
    store.go_on.set()
    while not (cache.request("a") and cache.request("nobody")):
        cache.wait(20)
    assert cache.sizes()[1]["host"] == NBYTES


def test_adapters_move_down_as_bytes_ask_and_up_when_they_are_used(
    make_cache: MakeCache, store: SlowStore, counted: list[tuple[str, str | None]]
) -> None:
    store.go_on.set()
    cache = make_cache(2 * NBYTES, device=NBYTES)
    for number, name in enumerate("abcd"):
        put(cache, name, adapter_of(float(number)))
    # d is at hand, b and c on the host, a on disk alone
    assert cache.sizes()[0] == {"device": 1, "host": 2, "disk": 4}
    assert cache.sizes()[1]["device"] == NBYTES
    assert cache.sizes()[1]["host"] == 2 * NBYTES
    moves = [("adapter_evictions_total", "device")] * 3 + [("adapter_evictions_total", "host")]
    assert sorted(counted, key=str) == sorted(moves, key=str)
    counted.clear()
    assert use(cache, "b").manifest["value"] == 1
    assert use(cache, "b").manifest["value"] == 1
    assert use(cache, "a").manifest["value"] == 0
    assert counted == [
        ("adapter_hits_total", "host"),
        ("adapter_evictions_total", "device"),  # d goes where b was
        ("adapter_hits_total", "device"),
        ("adapter_hits_total", "disk"),
        ("adapter_evictions_total", "device"),  # b
        ("adapter_evictions_total", "host"),  # c, the oldest there
    ]
    assert store.num_loads == 1
    cache.evict("b")
    assert cache.sizes()[0] == {"device": 1, "host": 1, "disk": 3}


def test_what_is_in_use_stays_where_it_is_and_counts(
    make_cache: MakeCache, store: SlowStore
) -> None:
    store.go_on.set()
    cache = make_cache(NBYTES, device=NBYTES)
    put(cache, "a", adapter_of(0.0))
    first, second = cache.acquire("a"), cache.acquire("a")
    assert first is second
    for name in "bc":
        put(cache, name, adapter_of(1.0))  # no room beside a
    assert cache.sizes()[0] == {"device": 1, "host": 1, "disk": 3}
    other = cache.acquire("b")
    assert cache.sizes()[1]["device"] == 2 * NBYTES  # over its bound, and says so
    cache.release("a")
    assert cache.acquire("a") is first  # one user was left
    for _ in range(2):
        cache.release("a")
    assert cache.sizes()[1]["device"] == NBYTES
    assert cache.acquire("b") is other
    cache.evict("b")  # in use or not
    assert cache.sizes()[0] == {"device": 0, "host": 1, "disk": 2}
    for _ in range(2):
        cache.release("b")
    with pytest.raises(KeyError):
        cache.acquire("b")
    assert cache.sizes()[0] == {"device": 0, "host": 1, "disk": 2}


def test_a_cpu_has_one_tier_and_a_gpu_two() -> None:
    def names(device: str, idle_states: IdleStates) -> dict[str, tuple[int, str]]:
        tiers = tiers_of(
            torch.device(device), device_bytes=7, host_bytes=9, idle_states=idle_states
        )
        return {tier.name: (tier.capacity_bytes, tier.idle_states) for tier in tiers}

    assert names("cpu", "exact") == {"host": (9, "exact")}
    assert names("cpu", "int8") == {"device": (0, "exact"), "host": (9, "int8")}
    assert names("cuda", "exact") == {"device": (7, "exact"), "host": (9, "exact")}
    assert names("cuda", "int8") == {"device": (7, "exact"), "host": (9, "int8")}


def test_state_and_delta_go_to_the_device_and_the_document_stays() -> None:
    delta = LoraDelta.init({"x": (3, 2)}, 1, seed=0)
    adapter = Adapter(
        tokens_T=torch.arange(4),
        entropy_T=torch.zeros(4),
        state=RecurrentState(({"S": torch.zeros(1, 2)},)),
        delta=delta,
    )
    assert adapter.to("cpu") is adapter
    moved = adapter.to("meta")
    assert moved.delta is not None
    parts = [*moved.state.tensors(), *moved.delta.parameters()]
    assert {part.device.type for part in parts} == {"meta"}
    assert moved.tokens_T.device == moved.entropy_T.device == CPU


# ---- idle states in int8 -----------------------------------------------------------------------


def noisy(seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    matrix_BHKV = torch.randn(1, 2, 8, 16, generator=draw) * torch.rand(8, 1, generator=draw)
    matrix_BHKV[0, 1, 3] = 0.0
    state = {"S": matrix_BHKV, "conv_q": torch.randn(1, 3, 16, generator=draw)}
    return Adapter(
        tokens_T=torch.arange(4), entropy_T=torch.rand(4), state=RecurrentState((state,))
    )


def test_packing_rounds_by_half_a_step_of_each_row() -> None:
    adapter = noisy(0)
    packed = PackedAdapter.of(adapter)
    again = packed.to(CPU)
    mine, right = again.state.layers[0], adapter.state.layers[0]
    step_BHK1 = right["S"].abs().amax(-1, keepdim=True) / 127
    assert ((mine["S"] - right["S"]).abs() <= 0.501 * step_BHK1).all()
    assert not torch.equal(mine["S"], right["S"])
    assert torch.equal(mine["conv_q"], right["conv_q"])
    assert torch.equal(again.entropy_T, adapter.entropy_T)
    small = right["S"].numel() + 4 * step_BHK1.numel()
    assert packed.nbytes == adapter.nbytes - right["S"].nbytes + small


def test_what_is_packed_keeps_no_more_in_memory_than_it_counts(store: SlowStore) -> None:
    store.go_on.set()
    store.save("a", noisy(0))
    packed = PackedAdapter.of(store.load("a"))
    kept = [*packed.rest.state.tensors(), packed.rest.entropy_T, packed.rest.tokens_T]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_a_state_that_is_not_finite_is_not_packed() -> None:
    adapter = noisy(0)
    adapter.state.layers[0]["S"][0, 0, 0, 0] = torch.inf
    again = PackedAdapter.of(adapter).to(CPU)
    assert torch.equal(again.state.layers[0]["S"], adapter.state.layers[0]["S"])


def test_idle_adapters_are_packed_once_and_whole_while_in_use(
    make_cache: MakeCache, store: SlowStore
) -> None:
    store.go_on.set()
    adapter = noisy(0)
    cache = make_cache(10 * adapter.nbytes, device=0, idle="int8")
    put(cache, "a", adapter)
    assert cache.sizes()[0] == {"device": 0, "host": 1, "disk": 1}
    idle_bytes = cache.sizes()[1]["host"]
    assert idle_bytes < adapter.nbytes
    first = cache.acquire("a")
    assert cache.sizes()[1]["device"] == adapter.nbytes + idle_bytes  # both forms are there
    cache.release("a")
    assert cache.sizes()[1] == {"device": 0, "host": idle_bytes, "disk": cache.sizes()[1]["disk"]}
    second = use(cache, "a")
    assert torch.equal(first.state.layers[0]["S"], second.state.layers[0]["S"])
    stored = store.load("a").state.layers[0]["S"]
    assert torch.equal(stored, adapter.state.layers[0]["S"])  # the file is exact
