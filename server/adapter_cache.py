"""Adapters in two tiers: some in memory, least recently used out first, all of them on disk.

Knows sizes and hits; knows nothing of who uses an adapter. What is in use stays alive through its
user's reference, even after it has left this cache.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore
from imprint.server.messages import Observation

Observe = Callable[[Observation], None]


class AdapterCache:
    """A bounded amount of adapters over the store that keeps them all."""

    def __init__(self, store: AdapterStore, capacity_bytes: int, observe: Observe) -> None:
        self.capacity_bytes = capacity_bytes
        self._store = store
        self._observe = observe
        self._host: OrderedDict[str, Adapter] = OrderedDict()
        self._disk_bytes: dict[str, int] = {}
        for adapter_id in store.ids():
            with suppress(FileNotFoundError):  # another worker has just deleted it
                self._disk_bytes[adapter_id] = store.path(adapter_id).stat().st_size

    def get(self, adapter_id: str) -> Adapter:
        """The adapter, from memory or disk; raises what the store raises where there is none."""
        adapter = self._host.get(adapter_id)
        if adapter is not None:
            self._host.move_to_end(adapter_id)
            self._count("adapter_hits_total", tier="host")
            return adapter
        try:
            adapter = self._store.load(adapter_id)
        except KeyError:
            self._count("adapter_misses_total")
            raise
        self._count("adapter_hits_total", tier="disk")
        self._disk_bytes[adapter_id] = self._store.path(adapter_id).stat().st_size
        self._keep(adapter_id, adapter)
        return adapter

    def put(self, adapter_id: str, adapter: Adapter) -> None:
        """Write an adapter to disk, atomically, and keep it in memory."""
        self._store.save(adapter_id, adapter)
        self._disk_bytes[adapter_id] = self._store.path(adapter_id).stat().st_size
        self._keep(adapter_id, adapter)

    def evict(self, adapter_id: str) -> None:
        """Drop an adapter from both tiers; unknown ids are fine."""
        self._host.pop(adapter_id, None)
        with suppress(ValueError):  # an id that no file can have
            self._store.delete(adapter_id)
        self._disk_bytes.pop(adapter_id, None)

    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number and bytes of the adapters per tier."""
        host_bytes = sum(adapter.nbytes for adapter in self._host.values())
        return (
            {"host": len(self._host), "disk": len(self._disk_bytes)},
            {"host": host_bytes, "disk": sum(self._disk_bytes.values())},
        )

    def _keep(self, adapter_id: str, adapter: Adapter) -> None:
        self._host.pop(adapter_id, None)
        self._host[adapter_id] = adapter
        total = sum(kept.nbytes for kept in self._host.values())
        while total > self.capacity_bytes and self._host:
            _, left = self._host.popitem(last=False)
            total -= left.nbytes
            self._count("adapter_evictions_total", tier="host")

    def _count(self, name: str, **labels: str) -> None:
        self._observe(Observation(name=name, value=1.0, labels=labels))
