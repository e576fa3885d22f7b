"""What is kept and for how long: deletion that frees before it answers, expiry, forgetting.

Knows journal, pool and jobs; knows nothing of HTTP. A deletion is marked in the journal first, so
that a restart goes on with it.
"""

import asyncio
import logging
import re
import time
from collections.abc import Coroutine
from typing import Any

from imprint.adapters.files import FileFolder
from imprint.server import document_journal, replay_journal, retention_journal
from imprint.server.background import Background
from imprint.server.documents import Documents
from imprint.server.errors import OverloadedError, WorkFailedError
from imprint.server.jobs import Jobs
from imprint.server.journal import Journal
from imprint.server.journal_file import JournalUnavailableError
from imprint.server.journal_thread import JournalThread
from imprint.server.metrics import Metrics
from imprint.server.pool_interface import Pool
from imprint.server.uses import Uses

logger = logging.getLogger(__name__)

DELETE_WAIT_S = 60.0
ADAPTATION = re.compile(r"adp_[0-9a-f]+")
"""How the adapters are named that a server makes; the store's folder may hold other files."""
LOST_ADAPTER = {"adapter_not_found": "adapter_evicted", "adapter_corrupt": "adapter_corrupt"}
"""What a worker says of an adapter that it cannot load, and what the client hears."""
SWEEP_INTERVAL_S = 5.0
MAX_EXPIRING = 8
"""Adapters that one sweep frees at a time."""


class Retention:
    """Frees adapters."""

    def __init__(
        self,
        journal: JournalThread,
        pool: Pool,
        jobs: Jobs,
        documents: Documents,
        metrics: Metrics,
        adapters: FileFolder,
        *,
        history_s: float,
    ) -> None:
        self._journal = journal
        self._pool = pool
        self._jobs = jobs
        self._documents = documents
        self._metrics = metrics
        self._adapters = adapters
        self._history_s = history_s
        self._background = Background()
        self._deletions: dict[str, asyncio.Task[None]] = {}
        self._uses = Uses()
        self.using = self._uses.using
        """While an adapter is asked, `async with retention.using(id)`: it is not idle then."""

    async def start(self) -> None:
        """Go on with deletions that were cut short, free what was left behind, and sweep from time
        to time."""
        for row in await self._journal(Journal.unfinished):
            if row.deleting:
                self._begin_deletion(row.id)
        for id in await self._journal(document_journal.unfinished_deletions):
            self._begin(id, self._delete_document(id))
        # listed here, before any new adaptation can leave a file
        left = await asyncio.to_thread(self._adapters.ids)
        self._background.spawn(self._free_strays([id for id in left if ADAPTATION.fullmatch(id)]))
        self._background.spawn(self._sweep_forever())

    async def _free_strays(self, ids: list[str]) -> None:
        """Free those of these adapters that a process left which died. Other files stay."""
        for id in await self._journal(retention_journal.strays, ids):
            logger.warning("the adapter %s is of no adaptation any more, and is deleted", id)
            await self._pool.evict(id)

    async def close(self) -> None:
        """Stop; deletions that are not complete go on at the next start."""
        await self._background.close()

    async def delete(self, id: str, owner: str) -> None:
        """Return when no memory, file or journal row holds the adaptation."""
        row = await self._journal(Journal.get, id)
        if row is None or row.owner != owner or not row.deleting:
            await self._jobs.get(id, owner)
            await self._journal(Journal.mark_deleting, id)
        await self._confirm(self._deletions.get(id) or self._begin_deletion(id))

    async def delete_document(self, id: str, owner: str) -> None:
        """Return when nothing holds the document or an adaptation of it."""
        row = await self._journal(document_journal.get_document, id)
        if row is None or not row.deleting or row.owner != owner:
            await self._documents.get(id, owner)
            await self._journal(document_journal.mark_document_deleting, id)
        deletion = self._deletions.get(id) or self._begin(id, self._delete_document(id))
        await self._confirm(deletion)

    async def _confirm(self, deletion: "asyncio.Task[None]") -> None:
        done, _ = await asyncio.wait({deletion}, timeout=DELETE_WAIT_S)
        if not done or deletion.cancelled() or deletion.exception():
            raise OverloadedError(
                "the deletion goes on: a worker has not confirmed it yet; ask again",
                code="deletion_pending",
                retry_after_s=5,
            )

    def _begin_deletion(self, id: str) -> "asyncio.Task[None]":
        return self._begin(id, self._delete(id))

    def _begin(self, id: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        deletion = self._deletions[id] = self._background.spawn(work)
        deletion.add_done_callback(lambda _: self._deletions.pop(id))
        return deletion

    async def _delete(self, id: str) -> None:
        await self._jobs.stop(id)
        await self._pool.evict(id)
        await self._journal.persist(replay_journal.forget_replies_about, id)
        await self._journal.persist(Journal.delete, id)

    async def _delete_document(self, id: str) -> None:
        row = await self._journal(document_journal.get_document, id)
        if row is None:
            return
        for adaptation_id in await self._journal(document_journal.adaptations_of, row):
            await self._journal.persist(Journal.mark_deleting, adaptation_id)
            await (self._deletions.get(adaptation_id) or self._begin_deletion(adaptation_id))
        await self._journal.persist(replay_journal.forget_replies_about, id)
        await self._journal.persist(document_journal.delete_document, row)

    async def expire(self, id: str, reason: str) -> None:
        """Free a ready adaptation's adapter; asking for it is a 410 from now on."""
        if await self._journal(Journal.expire, id, reason=reason):
            self._metrics.adaptations.labels(outcome="expired").inc()
        await self._pool.evict(id)

    async def lost(self, id: str | None, error: WorkFailedError) -> WorkFailedError:
        """What the client hears; the adaptation is marked where its adapter proved to be gone."""
        code = LOST_ADAPTER.get(error.code)
        if id is None or code is None:
            return error
        await self.expire(id, code)
        return WorkFailedError(code, f"the adapter of {id} is gone: {error.message}")

    async def sweep(self) -> None:
        """Free the adapters whose time is over, and forget what ended long ago."""
        if uses := self._uses.recent():
            await self._journal(Journal.touch, uses)
            self._uses.told(uses)
        await self._expire_all(await self._journal(Journal.due, time.time()))
        for id in await self._journal(document_journal.due_documents, time.time()):
            await self._journal(document_journal.mark_document_deleting, id)
            self._begin(id, self._delete_document(id))
        await self._journal(Journal.forget, time.time() - self._history_s)
        await self._journal(replay_journal.forget_replies, time.time())

    async def _expire_all(self, due: list[tuple[str, str]]) -> None:
        """A few at a time: each waits for workers, and one that does not answer holds up few.

        None is broken off because another failed: its row says already that it is gone.
        """
        waiting = iter(due)

        async def some() -> None:
            for id, reason in waiting:
                await self.expire(id, reason)

        lanes = (some() for _ in range(min(MAX_EXPIRING, len(due))))
        for outcome in await asyncio.gather(*lanes, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except JournalUnavailableError as error:  # the disk is full, say: later, then
                logger.error("the journal cannot be written: %s", error)
            await asyncio.sleep(SWEEP_INTERVAL_S)
