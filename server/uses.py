"""When each adapter was asked last, in memory, until the journal is told. Knows ids only.

Limit: the journal is told from time to time, so a crash forgets the uses of the last seconds.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Uses:
    """Adapters in use, and those used of late."""

    def __init__(self) -> None:
        self._in_use: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    @asynccontextmanager
    async def using(self, adapter_id: str | None) -> AsyncIterator[None]:
        """It is being asked until the context ends; None is the base model."""
        if adapter_id is None:
            yield
            return
        self._in_use[adapter_id] += 1
        try:
            yield
        finally:
            self._in_use -= Counter([adapter_id])  # at zero it is gone
            self._last[adapter_id] = time.time()

    def recent(self) -> dict[str, float]:
        """Unix time of the last use of what was used since `told`; now, of what is in use."""
        now = time.time()
        return {**self._last, **dict.fromkeys(self._in_use, now)}

    def told(self, uses: dict[str, float]) -> None:
        """The journal knows these: forget them, but for those used again since."""
        self._last = {id: at for id, at in self._last.items() if at > uses.get(id, 0.0)}
