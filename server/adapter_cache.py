"""Adapters in two tiers: some in memory, least recently used out first, all of them on disk.

Files are read and verified in a thread of their own, so that decoding goes on meanwhile; all else
happens in the caller's. Knows sizes and hits; knows nothing of who uses an adapter. What is in use
stays alive through its user's reference, even after it has left this cache. Limit: memory is one
tier; tensors lie where the store loads them, on the host.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
        self._host_bytes = 0
        self._loads: dict[str, Future[Adapter]] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")
        self._disk_bytes: dict[str, int] = {}
        for adapter_id in store.ids():
            with suppress(FileNotFoundError):  # another worker has just deleted it
                self._disk_bytes[adapter_id] = store.path(adapter_id).stat().st_size

    def request(self, adapter_id: str) -> bool:
        """Whether `get` would return at once; if not, a load has been begun, or goes on."""
        if adapter_id in self._host:
            return True
        load = self._loads.get(adapter_id)
        if load is None:
            load = self._loads[adapter_id] = self._loader.submit(self._store.load, adapter_id)
        return load.done()

    def get(self, adapter_id: str) -> Adapter:
        """The adapter, from memory or disk; raises what the store raises where there is none.

        Waits for the disk, unless `request` has said that there is nothing to wait for.
        """
        if not self.request(adapter_id):
            self._loads[adapter_id].exception()  # wait
        adapter = self._host.get(adapter_id)
        if adapter is not None:
            self._host.move_to_end(adapter_id)
            self._count("adapter_hits_total", tier="host")
            return adapter
        try:
            adapter = self._loads.pop(adapter_id).result()
        except KeyError:
            self._count("adapter_misses_total")
            raise
        self._count("adapter_hits_total", tier="disk")
        with suppress(FileNotFoundError):  # another worker has just deleted it
            self._disk_bytes[adapter_id] = self._store.path(adapter_id).stat().st_size
        self._keep(adapter_id, adapter)
        return adapter

    def wait(self, timeout_s: float) -> None:
        """Until one of the loads is done, or the time is over; at once where there are none."""
        if self._loads:
            wait(self._loads.values(), timeout_s, FIRST_COMPLETED)

    def put(self, adapter_id: str, adapter: Adapter) -> None:
        """Write an adapter to disk, atomically, and keep it in memory."""
        self._store.save(adapter_id, adapter)
        self._disk_bytes[adapter_id] = self._store.path(adapter_id).stat().st_size
        self._keep(adapter_id, adapter)

    def evict(self, adapter_id: str) -> None:
        """Drop an adapter from both tiers; unknown ids are fine."""
        load = self._loads.pop(adapter_id, None)
        if load is not None and not load.cancel():
            load.exception()  # wait: afterwards the thread holds nothing of it
        self._leave(adapter_id)
        with suppress(ValueError):  # an id that no file can have
            self._store.delete(adapter_id)
        self._disk_bytes.pop(adapter_id, None)

    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number and bytes of the adapters per tier."""
        self._take_in()
        return (
            {"host": len(self._host), "disk": len(self._disk_bytes)},
            {"host": self._host_bytes, "disk": sum(self._disk_bytes.values())},
        )

    def _keep(self, adapter_id: str, adapter: Adapter) -> None:
        self._leave(adapter_id)
        self._host[adapter_id] = adapter
        self._host_bytes += adapter.nbytes
        while self._host_bytes > self.capacity_bytes:
            self._leave(next(iter(self._host)))
            self._count("adapter_evictions_total", tier="host")

    def _take_in(self) -> None:
        """Keep what was loaded for a request that has gone meanwhile."""
        for adapter_id in [id for id, load in self._loads.items() if load.done()]:
            load = self._loads.pop(adapter_id)
            if load.exception() is None:
                self._keep(adapter_id, load.result())

    def _leave(self, adapter_id: str) -> None:
        adapter = self._host.pop(adapter_id, None)
        if adapter is not None:
            self._host_bytes -= adapter.nbytes

    def _count(self, name: str, **labels: str) -> None:
        self._observe(Observation(name=name, value=1.0, labels=labels))
