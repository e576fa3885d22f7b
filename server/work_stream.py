"""The messages about one adaptation or request, as an async generator that its consumer may close.

Knows queues; knows nothing of sockets. The queue holds at most what one piece of work can say,
which its `max_tokens` or steps bound.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType

from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    Generate,
    RequestFailed,
    SequenceDone,
    WorkMessage,
)


class WorkStream(AsyncGenerator[WorkMessage, None]):
    """Ends after the terminal message; closed before, it calls `on_close` once."""

    def __init__(self, work: Adapt | Generate, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._queue: asyncio.Queue[WorkMessage] = asyncio.Queue()
        self._num_open = len(work.prompts) if isinstance(work, Generate) else 1
        self._closed = False
        self.ended = False
        """Whether the terminal message has been put."""

    def put(self, message: WorkMessage) -> None:
        """Add a message; what comes after the terminal one, or after `aclose`, is dropped."""
        if self.ended:
            return
        if isinstance(message, SequenceDone):
            self._num_open -= 1
        self.ended = self._num_open <= 0 or isinstance(
            message, AdaptationDone | AdaptationFailed | RequestFailed
        )
        if not self._closed:
            self._queue.put_nowait(message)

    async def asend(self, value: None) -> WorkMessage:
        """The next message."""
        if self._closed or (self.ended and self._queue.empty()):
            raise StopAsyncIteration
        return await self._queue.get()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> WorkMessage:
        """Close, then raise what was thrown in."""
        await self.aclose()
        raise typ if isinstance(typ, BaseException) else typ(val)

    async def aclose(self) -> None:
        """Give up: work that has not ended is cancelled."""
        if not self._closed and not self.ended:
            self._on_close()
        self._closed = True
