"""The journal behind a thread of its own, for use from the event loop. Knows no rows."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from imprint.server.journal import Journal

P = ParamSpec("P")
T = TypeVar("T")


class JournalThread:
    """`await journal(Journal.get, id)` runs `Journal.get(id)` in the thread, in calling order."""

    def __init__(self, path: Path) -> None:
        """Opens the file at once, in the calling thread; raises JournalError."""
        self._journal = Journal(path)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    async def __call__(
        self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The method's result. Cancelling the caller does not undo what the thread has begun."""
        call = partial(method, self._journal, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def close(self) -> None:
        """Finishes what was asked and closes the file."""
        await self(Journal.close)
        self._executor.shutdown(wait=False)
