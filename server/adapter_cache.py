"""Adapters in tiers: at hand on the model's device, on the host, and all of them on disk.

They move down least recently used first, as bytes ask, and up when they are used. One in use (by a
request, by a study that reads on from it, or by its own way to the disk) is pinned: it counts, and
stays where it is. Files are read and verified in a thread of their own, and written in another (see
`adapter_writes.py`), so that decoding goes on meanwhile; all else happens in the caller's, moves
between devices too. Knows sizes, pins and hits; knows nothing of who uses an adapter.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore
from imprint.server.adapter_tiers import Held, Tier
from imprint.server.adapter_writes import AdapterWrites
from imprint.server.messages import Observation

Observe = Callable[[Observation], None]


class AdapterCache:
    """Bounded tiers of memory over the store that keeps every adapter."""

    def __init__(
        self,
        store: AdapterStore,
        tiers: Sequence[Tier],
        observe: Observe,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tiers`: of memory, the one that adapters are used from first."""
        self.tiers = list(tiers)
        self._store = store
        self._observe = observe
        self._pins: Counter[str] = Counter()
        self._loads: dict[str, Future[Adapter]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")
        self._writes = AdapterWrites(store, clock)
        self._disk_bytes: dict[str, int] = {}
        for adapter_id in store.ids():
            with suppress(FileNotFoundError):  # another worker has just deleted it
                self._disk_bytes[adapter_id] = store.path(adapter_id).stat().st_size

    def request(self, adapter_id: str) -> bool:
        """Whether `acquire` would not wait for the disk; if it would, a load has been begun."""
        if any(adapter_id in tier for tier in self.tiers):
            return True
        load = self._loads.get(adapter_id)
        if load is None:
            load = self._loads[adapter_id] = self._loader.submit(self._store.load, adapter_id)
        return load.done()

    def acquire(self, adapter_id: str) -> Adapter:
        """The adapter, for use on the model's device and pinned there until as many `release`s;
        raises what the store raises where there is none.

        Waits for the disk, unless `request` has said that there is nothing to wait for.
        """
        adapter = self._at_hand(adapter_id)
        self._pins[adapter_id] += 1
        self._settle()
        return adapter

    def release(self, adapter_id: str) -> None:
        """Take one pin off; the adapter may move down from now on. It may be deleted already."""
        self._pins[adapter_id] -= 1
        if self._pins[adapter_id] <= 0:
            del self._pins[adapter_id]
        self._settle()

    def wait(self, timeout_s: float) -> None:
        """Until one of the loads or writes is done, or the time is over; at once where there are
        none."""
        under_way: list[Future[Any]] = [*self._loads.values(), *self._writes.futures()]
        if under_way:
            wait(under_way, timeout_s, FIRST_COMPLETED)

    def put(self, adapter_id: str, adapter: Adapter) -> None:
        """Keep an adapter at hand, and begin to write it to disk, atomically.

        It is pinned until `confirm`, and nobody may change it from now on.
        """
        self._keep(adapter_id, Held(adapter))
        self._pins[adapter_id] += 1
        self._writes.begin(adapter_id, adapter)
        self._settle()

    @property
    def writing(self) -> list[str]:
        """What has been `put` and neither confirmed nor evicted."""
        return self._writes.ids()

    def written(self) -> list[str]:
        """Those of `writing` that are to be confirmed; see `AdapterWrites.due`."""
        return self._writes.due()

    def confirm(self, adapter_id: str) -> None:
        """Rely on an adapter from now on, which the disk has; waits for that.

        Raises OSError where the disk has not taken it: then it is not at hand either.
        """
        write = self._writes.take(adapter_id)
        if write.exception() is not None:
            self._forget(adapter_id)
        self.release(adapter_id)
        self._disk_bytes[adapter_id] = write.result()

    def evict(self, adapter_id: str) -> None:
        """Drop an adapter from every tier, pinned or not; unknown ids are fine."""
        load = self._loads.pop(adapter_id, None)
        if load is not None and not load.cancel():
            load.exception()  # wait: afterwards the thread holds nothing of it
        was_on_its_way = self._writes.drop(adapter_id)
        self._forget(adapter_id)
        if was_on_its_way:
            self.release(adapter_id)
        with suppress(ValueError):  # an id that no file can have
            self._store.delete(adapter_id)
        self._disk_bytes.pop(adapter_id, None)

    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number and bytes of the adapters per tier."""
        self._take_in()
        return (
            {**{tier.name: len(tier) for tier in self.tiers}, "disk": len(self._disk_bytes)},
            {
                **{tier.name: tier.num_bytes for tier in self.tiers},
                "disk": sum(self._disk_bytes.values()),
            },
        )

    def capacities(self) -> dict[str, int]:
        """Bytes that each tier of memory may hold."""
        return {tier.name: tier.capacity_bytes for tier in self.tiers}

    def _at_hand(self, adapter_id: str) -> Adapter:
        """Move an adapter to the first tier, from wherever it is."""
        for tier in self.tiers:
            if adapter_id not in tier:
                continue
            adapter = tier.use(adapter_id) if tier is self.tiers[0] else None
            self._count("adapter_hits_total", tier=tier.name)
            if adapter is None:
                held = tier.take(adapter_id)
                assert held is not None
                adapter = self._keep(adapter_id, held)
            return adapter
        return self._keep(adapter_id, Held(self._loaded(adapter_id)))

    def _loaded(self, adapter_id: str) -> Adapter:
        if not self.request(adapter_id):
            self._loads[adapter_id].exception()  # wait
        try:
            adapter = self._loads.pop(adapter_id).result()
        except KeyError:
            self._count("adapter_misses_total")
            raise
        self._count("adapter_hits_total", tier="disk")
        with suppress(FileNotFoundError):  # another worker has just deleted it
            self._disk_bytes[adapter_id] = self._store.path(adapter_id).stat().st_size
        return adapter

    def _keep(self, adapter_id: str, held: Held) -> Adapter:
        """Put into the first tier what is in none."""
        self._forget(adapter_id)
        first = self.tiers[0]
        first.put(adapter_id, held)
        adapter = first.use(adapter_id)
        assert adapter is not None, "the first tier holds whole adapters"
        return adapter

    def _forget(self, adapter_id: str) -> None:
        for tier in self.tiers:
            tier.take(adapter_id)

    def _settle(self) -> None:
        """Move down what is too much, until each tier is within its bytes, or all of it pinned."""
        for tier, below in zip(self.tiers, [*self.tiers[1:], None], strict=True):
            while (adapter_id := tier.surplus(self._pins)) is not None:
                held = tier.take(adapter_id)
                assert held is not None
                if below is not None and below.capacity_bytes:
                    below.put(adapter_id, held)
                self._count("adapter_evictions_total", tier=tier.name)

    def _take_in(self) -> None:
        """Keep what was loaded for a request that has gone meanwhile."""
        for adapter_id in [id for id, load in self._loads.items() if load.done()]:
            load = self._loads.pop(adapter_id)
            if load.exception() is None:
                self._keep(adapter_id, Held(load.result()))
        self._settle()

    def _count(self, name: str, **labels: str) -> None:
        self._observe(Observation(name=name, value=1.0, labels=labels))
