"""Tasks that outlive the request that began them: kept, logged when they fail, ended together."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from imprint.server.errors import ImprintError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Background:
    """A set of tasks. The event loop alone holds tasks weakly: they could vanish half-way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run it now; an error that no client can be told is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and not isinstance(task.exception(), ImprintError | None):
            logger.error("background work failed", exc_info=task.exception())

    async def close(self) -> None:
        """Cancel all, also those that the cancelled ones begin."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
