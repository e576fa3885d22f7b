"""Adapters on their way to the disk: written in a thread, one after another, in order of arrival.

Decoding goes on meanwhile. Knows the store and how long a write has taken; knows nothing of tiers
or of who made an adapter. Limit: a write that has begun can be waited for, not broken off.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from imprint.adapters.adapter import Adapter
from imprint.adapters.store import AdapterStore

PATIENCE_S = 30.0
"""A disk that takes longer for one adapter is taken for one that hangs."""


class AdapterWrites:
    """What has been given to the disk and not been taken back from here."""

    def __init__(self, store: AdapterStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._writes: dict[str, Future[int]] = {}
        self._began_at: float | None = None
        """Since when the thread has been writing what it writes now."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-writer")

    def ids(self) -> list[str]:
        """All that are on their way, in order."""
        return list(self._writes)

    def futures(self) -> list[Future[int]]:
        """What is done when one of them is."""
        return list(self._writes.values())

    def begin(self, adapter_id: str, adapter: Adapter) -> None:
        """Write an adapter, atomically. Nobody may change it from now on."""
        assert adapter_id not in self._writes
        self._writes[adapter_id] = self._thread.submit(self._write, adapter_id, adapter)

    def _write(self, adapter_id: str, adapter: Adapter) -> int:
        self._began_at = self._clock()
        try:
            return self._store.save(adapter_id, adapter)
        finally:
            self._began_at = None

    def due(self) -> list[str]:
        """Those that the disk has, or has refused; and the one for which it takes so long that it
        hangs: who waits for that falls silent, as one whose device hangs, and is replaced."""
        num_ended = sum(write.done() for write in self._writes.values())  # the first ones
        return self.ids()[: num_ended + self._hanging]

    @property
    def _hanging(self) -> bool:
        began_at = self._began_at
        return began_at is not None and self._clock() - began_at > PATIENCE_S

    def take(self, adapter_id: str) -> Future[int]:
        """The outcome of one that is on its way: bytes on disk, or an error. Waits for it."""
        write = self._writes.pop(adapter_id)
        write.exception()
        return write

    def drop(self, adapter_id: str) -> bool:
        """Write it no more, or wait until it is written; whether it was on its way at all."""
        write = self._writes.pop(adapter_id, None)
        if write is not None and not write.cancel():
            write.exception()  # afterwards the thread holds nothing of it
        return write is not None
