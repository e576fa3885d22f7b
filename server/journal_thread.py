"""The journal behind a thread of its own, for use from the event loop. Knows no rows."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from imprint.server.journal import Journal
from imprint.server.journal_file import JournalUnavailableError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0


class JournalThread:
    """`await journal(Journal.get, id)` runs `Journal.get(id)` in the thread, in calling order."""

    def __init__(self, path: Path) -> None:
        """Opens the file at once, in the calling thread; raises JournalError."""
        self._journal = Journal(path)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    async def __call__(
        self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The method's result. Cancelling the caller does not undo what the thread has begun.

        Raises JournalUnavailableError where the disk does not take it; nothing is written then.
        """
        call = partial(method, self._journal, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        except (sqlite3.OperationalError, OSError) as error:
            raise JournalUnavailableError(str(error)) from error

    async def persist(
        self, method: Callable[Concatenate[Journal, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The same, for what must not be lost: tried again until the disk takes it."""
        wait_s = FIRST_RETRY_S
        while True:
            try:
                return await self(method, *args, **kwargs)
            except JournalUnavailableError as error:
                logger.error("the journal cannot be written (%s); trying again", error)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LAST_RETRY_S)

    async def close(self) -> None:
        """Finishes what was asked and closes the file."""
        await self(Journal.close)
        self._executor.shutdown(wait=False)
