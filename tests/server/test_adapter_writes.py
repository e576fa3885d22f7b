"""Adapters are written beside other work: what is told when, and what a disk that is slow, full or
hanging costs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.files import StoreGoneError
from imprint.adapters.store import AdapterStore
from imprint.models import FastWeightModel, RecurrentState, load_model, load_tokenizer
from imprint.server.adapter_cache import AdapterCache
from imprint.server.adapter_tiers import Tier
from imprint.server.adapter_writes import PATIENCE_S, AdapterWrites
from imprint.server.engine import Engine
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    AdaptationStarted,
    Cancel,
    Drain,
    Evict,
    Evicted,
    FromWorker,
    Generate,
    Generated,
    Prompt,
    SequenceDone,
)
from imprint.server.worker_config import WorkerConfig


class SlowStore(AdapterStore):
    """A store whose disk waits until it is told to go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go_on, self.has_begun = threading.Event(), threading.Event()

    def save(self, adapter_id: str, adapter: Adapter) -> int:
        self.has_begun.set()
        assert self.go_on.wait(20)
        return super().save(adapter_id, adapter)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    store = SlowStore(tmp_path / "store")
    yield store
    store.go_on.set()  # no thread stays behind


def adapter_of(value: float) -> Adapter:
    return Adapter(
        tokens_T=torch.arange(4),
        entropy_T=torch.zeros(4),
        state=RecurrentState(({"S": torch.full((1, 2, 3), value)},)),
    )


# ---- the cache -----------------------------------------------------------------------------------


def cache_of(store: AdapterStore, num_bytes: int) -> AdapterCache:
    return AdapterCache(store, [Tier("host", torch.device("cpu"), num_bytes)], lambda _: None)


def test_a_write_goes_on_beside_other_work_and_its_adapter_is_pinned(store: SlowStore) -> None:
    cache = cache_of(store, 0)
    cache.put("a", adapter_of(1.0))  # the caller is not held up
    cache.put("b", adapter_of(2.0))
    assert (cache.writing, cache.written()) == (["a", "b"], [])
    assert cache.sizes()[0] == {"host": 2, "disk": 0}  # over its bound, and says so
    store.go_on.set()
    while cache.written() != ["a", "b"]:
        cache.wait(20)
    assert cache.sizes()[0] == {"host": 2, "disk": 0}  # until somebody relies on it
    for id in "ab":
        cache.confirm(id)
    assert cache.sizes()[0] == {"host": 0, "disk": 2}
    assert cache.sizes()[1]["disk"] == store.nbytes()
    assert cache.writing == []
    cache.wait(20)  # nothing to wait for


@pytest.mark.parametrize("has_begun", [True, False])
def test_what_is_evicted_on_its_way_to_the_disk_is_nowhere(
    store: SlowStore, has_begun: bool
) -> None:
    cache = cache_of(store, 10_000)
    cache.put("first", adapter_of(1.0))
    cache.put("second", adapter_of(2.0))
    assert store.has_begun.wait(20)
    threading.Timer(0.05, store.go_on.set).start()
    evicted, kept = ("first", "second") if has_begun else ("second", "first")
    cache.evict(evicted)
    cache.confirm(kept)
    assert store.ids() == [kept]
    assert cache.sizes()[0] == {"host": 1, "disk": 1}
    with pytest.raises(KeyError):
        cache.acquire(evicted)


def test_what_the_disk_refuses_is_raised_and_not_kept(store: SlowStore) -> None:
    cache = cache_of(store, 10_000)
    shutil.rmtree(store.root)
    store.go_on.set()
    cache.put("a", adapter_of(1.0))
    with pytest.raises(StoreGoneError):
        cache.confirm("a")
    assert cache.sizes()[0] == {"host": 0, "disk": 0}
    assert cache.writing == []


def test_only_the_write_that_hangs_is_waited_for(store: SlowStore) -> None:
    now = 0.0
    writes = AdapterWrites(store, lambda: now)
    for id in "abc":
        writes.begin(id, adapter_of(1.0))
    assert store.has_begun.wait(20)
    now = PATIENCE_S
    assert writes.due() == []
    now = PATIENCE_S + 1
    assert writes.due() == ["a"]  # those behind it have not had their time yet
    store.go_on.set()
    assert writes.take("a").result() > 0
    writes.take("c")
    assert writes.due() == ["b"]


# ---- the engine ----------------------------------------------------------------------------------


class Rig:
    """An engine on a slow disk. Whenever it says that an adapter is there, its file must be."""

    def __init__(self, model: FastWeightModel, checkpoint: Path, store: SlowStore) -> None:
        self.store, self.now = store, 0.0
        self.said: list[FromWorker] = []
        config = WorkerConfig(
            model=str(checkpoint), store=str(store.root), segment_tokens=32, num_slots=4
        )
        self.engine = Engine(
            model, load_tokenizer(checkpoint), config, self._hear, model_hash="h",
            clock=lambda: self.now,
        )  # fmt: skip
        self.engine.cache._writes = AdapterWrites(store, lambda: self.now)

    def _hear(self, message: FromWorker) -> None:
        if isinstance(message, AdaptationDone) and message.status == "succeeded":
            assert self.store.path(message.adaptation_id).exists()
        self.said += message.values if isinstance(message, Generated) else [message]

    def read(self, id: str) -> None:
        """Read a document, up to the way of its adapter to the disk."""
        self.engine.handle(Adapt(adaptation_id=id, tokens=[5] * 40, method={"type": "read"}))
        while id not in self.engine.cache.writing:
            self.engine.step()

    def run(self, until: type | None = None) -> None:
        while not any(isinstance(message, until) for message in self.said) if until else True:
            try:
                if not self.engine.step():
                    return
            except OSError as error:  # what the worker's loop does
                self.engine.fail_unit(error)

    def ends(self) -> list[FromWorker]:
        kinds = (AdaptationDone, AdaptationFailed, Evicted)
        return [message for message in self.said if isinstance(message, kinds)]

    def outcomes(self) -> list[tuple[str, str]]:
        return [(m.adaptation_id, m.status) for m in self.said if isinstance(m, AdaptationDone)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> FastWeightModel:
    return load_model(tiny_checkpoint)


@pytest.fixture
def rig(model: FastWeightModel, tiny_checkpoint: Path, store: SlowStore) -> Rig:
    return Rig(model, tiny_checkpoint, store)


def test_answers_decode_meanwhile_and_the_outcome_waits_for_the_disk(rig: Rig) -> None:
    rig.read("a")
    rig.now = 9.0
    prompt = Prompt(sequence_id="s", tokens=[5, 6])
    rig.engine.handle(Generate(request_id="r", prompts=[prompt], max_tokens=20))
    rig.run(until=SequenceDone)
    assert rig.ends() == []
    stats = rig.engine.stats()
    assert (stats.adaptations_running, stats.adaptation_finish_s) == (1, {"a": 0.0})
    rig.store.go_on.set()
    rig.run()
    (done,) = rig.ends()
    assert isinstance(done, AdaptationDone)
    assert (done.status, done.result["seconds"]) == ("succeeded", 9.0)
    assert isinstance(rig.said[0], AdaptationStarted)
    assert rig.said[-1] is done
    assert rig.engine.stats().adaptations_running == 0


def test_a_cancel_that_comes_too_late_changes_nothing(rig: Rig) -> None:
    rig.read("a")
    rig.engine.handle(Cancel(id="a"))
    rig.store.go_on.set()
    rig.run()
    assert rig.outcomes() == [("a", "succeeded")]


def test_a_deletion_ends_it_before_it_says_that_nothing_is_left(rig: Rig) -> None:
    rig.read("a")
    threading.Timer(0.05, rig.store.go_on.set).start()
    rig.engine.handle(Evict(adapter_id="a"))
    rig.run()
    assert rig.ends() == [
        AdaptationDone(adaptation_id="a", status="cancelled"), Evicted(adapter_id="a")
    ]  # fmt: skip
    assert not list(rig.store.root.rglob("a.*"))
    assert rig.engine.cache.sizes()[0] == {"host": 0, "disk": 0}


def test_a_drain_waits_for_the_disk(rig: Rig) -> None:
    rig.read("a")
    rig.engine.handle(Drain())
    assert rig.engine.step()
    assert not rig.engine.drained
    rig.store.go_on.set()
    rig.run()
    assert rig.engine.drained
    assert rig.outcomes() == [("a", "succeeded")]


def test_a_full_disk_fails_its_own_adaptation_only(rig: Rig) -> None:
    rig.read("a")
    rig.read("b")
    rig.store.path("a").mkdir()  # no file can get this name
    rig.store.go_on.set()
    rig.run()
    failed = rig.ends()[0]
    assert isinstance(failed, AdaptationFailed)
    assert (failed.adaptation_id, failed.code) == ("a", "store_failed")
    assert rig.outcomes() == [("b", "succeeded")]
    assert rig.engine.cache.sizes()[0] == {"host": 1, "disk": 1}
    rig.store.path("a").rmdir()
    rig.read("a")  # what the server does once there is room
    rig.run()
    assert rig.outcomes() == [("b", "succeeded"), ("a", "succeeded")]


def test_a_disk_that_hangs_silences_the_worker(rig: Rig) -> None:
    """Its heartbeats come from between two steps: whoever waits for them replaces it."""
    rig.read("a")
    assert rig.store.has_begun.wait(20)
    rig.now = PATIENCE_S + 1
    threading.Timer(0.2, rig.store.go_on.set).start()
    rig.engine.step()  # does not return before the disk does
    assert rig.store.go_on.is_set()
    assert rig.outcomes() == [("a", "succeeded")]
