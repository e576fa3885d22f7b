"""Adaptation jobs: journalled before they are promised, run to their end, resumed after a crash.

Knows the journal, the pool and the tokenizer; knows nothing of HTTP. What the journal says is the
truth; memory holds only what wakes those who wait.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from imprint.adapters.files import ProgressFolder
from imprint.models.tokenizer import Tokenizer
from imprint.server.background import Background
from imprint.server.documents import document_not_found
from imprint.server.errors import (
    DeadlineError,
    ImprintError,
    NotFoundError,
    OverloadedError,
    clip,
)
from imprint.server.job_run import ActiveJob, JobRun
from imprint.server.journal import (
    DocumentGoneError,
    Journal,
    JournalFullError,
    OwnerFullError,
)
from imprint.server.journal_file import JournalUnavailableError
from imprint.server.journal_thread import JournalThread
from imprint.server.metrics import Metrics
from imprint.server.places import Share, share_error
from imprint.server.pool_interface import Pool
from imprint.server.records import AdaptationRow, NewAdaptation

logger = logging.getLogger(__name__)

MAX_RESTARTS = 5
CANCEL_WAIT_S = 10.0
LOOK_UP_S = 0.02
"""How long a refusal may wait for the journal."""


class Jobs:
    """All adaptations of this server."""

    def __init__(
        self,
        journal: JournalThread,
        pool: Pool,
        tokenizer: Tokenizer,
        metrics: Metrics,
        progress: ProgressFolder,
        *,
        model: str,
        max_active: int,
        max_active_bytes: int,
        share: Share,
        drain_timeout_s: float,
    ) -> None:
        self.journal = journal
        self._pool = pool
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._progress = progress
        self._model = model
        self._max_active = max_active
        self._max_active_bytes = max_active_bytes
        self._share = share
        self._active: dict[str, ActiveJob] = {}
        self._background = Background()
        self._admission = asyncio.Lock()
        self._drain_timeout_s = drain_timeout_s
        self._drain_deadline: float | None = None

    # ---- life of the service

    async def start(self) -> None:
        """Take up what the journal holds unfinished."""
        for row in await self.journal(Journal.unfinished):
            if row.deleting:
                continue  # Retention goes on with it
            if row.cancel_requested:
                await self.journal(Journal.finish, row.id, "cancelled")
            elif row.model != self._model:
                message = f"accepted for the model {row.model}, which is not served any more"
                await self._refuse(row.id, "model_not_available", message)
            elif row.restarts >= MAX_RESTARTS:
                message = f"the server died {MAX_RESTARTS} times while this ran"
                await self._refuse(row.id, "worker_died", message)
            else:
                if row.status == "running":
                    await self.journal(Journal.requeue, row.id, reason="server_died", died=True)
                self._launch(row)
        await asyncio.to_thread(self._sweep, set(self._active))

    def _sweep(self, active: set[str]) -> None:
        """Delete checkpoints of jobs that a process which died has ended, or left to be deleted."""
        for id in set(self._progress.ids()) - active:
            self._progress.delete(id)

    @property
    def draining(self) -> bool:
        """Whether the server has begun to stop: nothing new is accepted."""
        return self._drain_deadline is not None

    @property
    def drain_left_s(self) -> float:
        """Seconds that running answers still have, once draining."""
        return max(0.0, (self._drain_deadline or 0.0) - time.monotonic())

    def drain(self, *, timeout_s: float | None = None) -> None:
        """Accept nothing new; a later call may only shorten the time. Event streams end now."""
        timeout_s = self._drain_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        self._drain_deadline = min(self._drain_deadline or deadline, deadline)
        for job in self._active.values():
            job.notify()

    async def _refuse(self, id: str, code: str, message: str) -> None:
        error = {"message": message, "code": code, "param": None}
        await self.journal(Journal.finish, id, "failed", error=error)
        self._metrics.adaptations.labels(outcome="failed").inc()

    async def close(self) -> None:
        """Stop following; what is unfinished stays so in the journal, for the next start."""
        self.drain()
        running = [id for id, job in self._active.items() if job.running]
        await self._background.close()
        for id in running:
            try:
                await self.journal(Journal.requeue, id, reason="server_stopped")
            except JournalUnavailableError as error:  # the next start takes it up all the same
                logger.error("%s is not written down as stopped: %s", id, error)

    # ---- creating

    async def create(self, new: NewAdaptation, tokens: list[int]) -> tuple[AdaptationRow, bool]:
        """The job for this request and whether it is new; durable when this returns."""
        self.refuse_when_draining()
        # Journalling and launching belong together: a client that hangs up must not part them.
        return await asyncio.shield(self._background.spawn(self._create(new, tokens)))

    async def create_import(self, new: NewAdaptation) -> tuple[AdaptationRow, bool]:
        """The same for a file that lies in the folder of imports. It is this job's from now on;
        where there is no new job, it is deleted."""
        return await asyncio.shield(self._background.spawn(self._create_import(new)))

    async def _create_import(self, new: NewAdaptation) -> tuple[AdaptationRow, bool]:
        is_new = False
        try:
            self.refuse_when_draining()
            row, is_new = await self._create(new, [])
            return row, is_new
        finally:
            if not is_new:
                await asyncio.to_thread(self._progress.delete, new.id)

    @asynccontextmanager
    async def borrow(self, new: NewAdaptation, tokens: list[int]) -> AsyncIterator[AdaptationRow]:
        """The job for an answer. When the last answer leaves that wants it, and nobody asked for
        it by name, it is cancelled."""
        self.refuse_when_draining()
        creation = self._background.spawn(self._create(new, tokens, waiter=True))
        try:
            row, _ = await asyncio.shield(creation)
            yield row
        finally:
            self._background.spawn(self._give_back(creation))

    def refuse_when_draining(self) -> None:
        """Raises OverloadedError once the server has begun to stop."""
        if self.draining:
            self._metrics.rejections.labels(reason="draining").inc()
            raise OverloadedError("the server is shutting down", code="draining", retry_after_s=10)

    def _refused(self, reason: JournalFullError) -> ImprintError:
        if isinstance(reason, OwnerFullError):
            return share_error(self._metrics, str(reason), self.backlog_s())
        self._metrics.rejections.labels(reason="queue_full").inc()
        return OverloadedError(f"{reason}; try again later", retry_after_s=self.backlog_s())

    def _lack_of_room(self, owner: str) -> JournalFullError | None:
        """What the journal would say to a new job, as far as memory knows it."""
        own, most = sum(job.row.owner == owner for job in self._active.values()), self._max_active
        if own >= self._share.of(most):
            return OwnerFullError(f"of yours, {own} adaptations are queued or running")
        if len(self._active) >= most:
            return JournalFullError(f"{len(self._active)} adaptations are queued or running")
        return None

    def refuse_without_room(self, owner: str) -> None:
        """Raises ShareError or OverloadedError where there is no room for a job that is surely
        new."""
        if (lack := self._lack_of_room(owner)) is not None:
            raise self._refused(lack)

    async def refuse_when_full(self, new: NewAdaptation) -> None:
        """Raises what `create` would, before anybody has tokenized the document: under overload
        most requests end here, and must cost little.

        A document is taken for new where the journal is too busy to say at once.
        """
        lack = self._lack_of_room(new.owner)
        if lack is None:
            return
        found = None
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_UP_S):
                found = await self.journal(Journal.find, new)
        if found is None:
            raise self._refused(lack)

    async def _create(
        self, new: NewAdaptation, tokens: list[int], *, waiter: bool = False
    ) -> tuple[AdaptationRow, bool]:
        async with self._admission:
            try:
                row, is_new = await self.journal(
                    Journal.create,
                    new,
                    max_active=self._max_active,
                    max_active_bytes=self._max_active_bytes,
                    max_own=self._share.of(self._max_active),
                    max_own_bytes=self._share.of(self._max_active_bytes),
                )
            except JournalFullError as error:
                raise self._refused(error) from None
            except DocumentGoneError as error:
                raise document_not_found(str(error), param="document_id") from None
            if is_new:
                self._launch(row, tokens)
            if waiter and row.id in self._active:
                self._active[row.id].num_waiters += 1
        return row, is_new

    async def _give_back(self, creation: "asyncio.Task[tuple[AdaptationRow, bool]]") -> None:
        await asyncio.wait({creation})
        if creation.cancelled() or creation.exception() is not None:
            return
        job = self._active.get(creation.result()[0].id)
        if job is None:
            return
        job.num_waiters -= 1
        async with self._admission:
            row = await self.journal(Journal.get, job.row.id)
            if job.num_waiters or row is None or row.pinned or not row.active:
                return
            await self._request_cancel(row.id)

    def _launch(self, row: AdaptationRow, tokens: list[int] | None = None) -> None:
        job = self._active[row.id] = ActiveJob(row)
        self._background.spawn(self._run(job, tokens))

    async def _run(self, job: ActiveJob, tokens: list[int] | None) -> None:
        run = JobRun(job, self.journal, self._pool, self._metrics, self._progress)
        try:
            await run.run(self._tokenizer, tokens)
        finally:
            del self._active[job.row.id]
            job.done.set()
            job.notify()

    # ---- asking, cancelling, deleting

    @property
    def num_active(self) -> int:
        """Adaptations queued or running."""
        return len(self._active)

    def active(self, id: str) -> ActiveJob | None:
        """The job in memory, while it is queued or running."""
        return self._active.get(id)

    async def get(self, id: str, owner: str, *, param: str | None = None) -> AdaptationRow:
        """The owner's adaptation; raises NotFoundError for every other id; `param` is where in the
        request it stands.

        Nothing tells a deleted one, another owner's and one that never was apart.
        """
        row = await self.journal(Journal.get, id)
        if row is None or row.deleting or row.owner != owner:
            message = f"no adaptation {clip(id)!r}"
            raise NotFoundError(message, code="adaptation_not_found", param=param)
        return row

    def finish_s(self, id: str) -> float | None:
        """Estimated seconds to a job's end; None when nobody can tell yet."""
        return self._pool.finish_s(id)

    def backlog_s(self) -> float:
        """Estimated seconds until all jobs are done, 1 at least: when to come back."""
        return max(self._pool.backlog_s(), 1.0)

    async def progress(self, id: str, deadline: float) -> AsyncGenerator[dict[str, Any], None]:
        """A job's progress at each change until it has ended; DeadlineError at the deadline."""
        while (job := self._active.get(id)) is not None:
            news = job.news()
            yield job.progress
            done, _ = await asyncio.wait({news}, timeout=deadline - time.monotonic())
            if not done:
                message = "the document was not read before the request's deadline"
                raise DeadlineError(message, "quantum" if job.running else "queue")

    async def cancel(self, id: str, owner: str) -> AdaptationRow:
        """Stop a job; one that has ended stays as it is. Waits a moment for the end."""
        if (await self.get(id, owner)).active:
            await self._request_cancel(id)
            if (job := self._active.get(id)) is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(job.done.wait(), CANCEL_WAIT_S)
        return await self.get(id, owner)

    async def _request_cancel(self, id: str) -> None:
        await self.journal(Journal.request_cancel, id)
        if (job := self._active.get(id)) is not None:
            job.cancelled.set()
            await self._pool.cancel(id)

    async def stop(self, id: str) -> None:
        """Return when nothing runs this job any more."""
        if (job := self._active.get(id)) is not None:
            job.cancelled.set()
            await self._pool.cancel(id)
            await job.done.wait()
