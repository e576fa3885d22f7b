"""One adaptation, followed from its submission to its outcome, each message written down.

Knows the journal, the pool's messages and the metrics; knows nothing of other jobs or of HTTP.
"""

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from imprint.adapters.files import ProgressFolder
from imprint.models.tokenizer import Tokenizer
from imprint.server import messages, study_journal
from imprint.server.document_journal import base_adaptation
from imprint.server.documents import encode_parts
from imprint.server.journal import Journal
from imprint.server.journal_thread import JournalThread
from imprint.server.logs import current_request_id, log_context
from imprint.server.metrics import Metrics
from imprint.server.pool_interface import Pool
from imprint.server.records import IMPORT, AdaptationRow
from imprint.server.tracing import current_span

logger = logging.getLogger(__name__)

STORE_FAILED = "store_failed"
STATES_OF_ROOM = 8
"""What the disk must have free before a job whose adapter it did not take is tried again."""
FIRST_STORE_WAIT_S, LAST_STORE_WAIT_S = 1.0, 30.0
PROGRESS_FIELDS = ("phase", "step", "steps", "num_tokens", "reward_mean")


class ActiveJob:
    """A queued or running adaptation in memory: its progress, and who waits for news of it."""

    def __init__(self, row: AdaptationRow) -> None:
        self.row = row
        """As it was when the job was made; the journal knows better."""
        self.running = False
        self.cancelled = asyncio.Event()
        self.num_waiters = 0
        self.progress: dict[str, Any] = {}
        self.done = asyncio.Event()
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def news(self) -> "asyncio.Future[None]":
        """Done at the next news. Take it *before* reading the journal, and nothing is missed."""
        return self._news

    def notify(self) -> None:
        """Wake all that wait."""
        old, self._news = self._news, asyncio.get_running_loop().create_future()
        old.set_result(None)


class JobRun:
    """Follows one job."""

    def __init__(
        self,
        job: ActiveJob,
        journal: JournalThread,
        pool: Pool,
        metrics: Metrics,
        progress: ProgressFolder,
    ) -> None:
        self._job = job
        self._row = job.row
        self._journal = journal.persist  # a job outlives a full disk
        self._pool = pool
        self._metrics = metrics
        self._progress = progress
        self._span = current_span().child(
            "adaptation", {"imprint.job": job.row.id, "imprint.document_tokens": job.row.num_tokens}
        )
        self._began_at = time.monotonic()
        self._phase: str | None = None
        self._phase_began_at = self._began_at

    async def run(self, tokenizer: Tokenizer, tokens: list[int] | None) -> None:
        """Until the job has an outcome in the journal; cancelled, it stays unfinished there."""
        self._metrics.waiting.labels(kind="adaptation").inc()
        with log_context(job_ids=[self._row.id]):
            await self._run(tokenizer, tokens)

    async def _run(self, tokenizer: Tokenizer, tokens: list[int] | None) -> None:
        try:
            await self._follow(tokenizer, tokens)
        except Exception:  # a job's outermost loop: whatever happened, the job must end
            logger.exception("adaptation %s failed", self._row.id)
            await self._end("failed", error=("internal_error", "the server failed on it"))
        finally:
            gauge = self._metrics.running if self._job.running else self._metrics.waiting
            gauge.labels(kind="adaptation").dec()
            self._span.end()

    async def _follow(self, tokenizer: Tokenizer, tokens: list[int] | None) -> None:
        row = self._row
        if tokens is None:
            parts = await self._journal(Journal.parts, row.id)
            tokens = await asyncio.to_thread(encode_parts, tokenizer, parts)
        if self._job.cancelled.is_set():
            await self._end("cancelled")
            return
        base_id = await self._journal(base_adaptation, row)
        work = messages.Adapt(
            adaptation_id=row.id,
            base_id=base_id or "",
            tokens=tokens,
            method=row.method,
            seed=row.seed,
            priority=row.priority,
            timeout_s=row.timeout_s,
            attempt=max(1, row.attempt),
            http_request=current_request_id(),
            traceparent=self._span.traceparent,
        )
        deadline = None if row.timeout_s is None else time.monotonic() + row.timeout_s
        wait_s = FIRST_STORE_WAIT_S
        while await self._attempt(work):
            if not await self._wait_for_store(wait_s):
                await self._end("cancelled")
                return
            wait_s = min(2 * wait_s, LAST_STORE_WAIT_S)
            if deadline is not None:
                left_s = max(deadline - time.monotonic(), 0.0)
                work = msgspec.structs.replace(work, timeout_s=left_s)

    async def _attempt(self, work: messages.Adapt) -> bool:
        """Follow one attempt; True where it failed because the store takes nothing."""
        async with aclosing(self._pool.submit(work)) as stream:
            async for message in stream:
                if _store_failed(message) and await self._is_pinned():
                    return True
                ended = await self._take(message)
                self._job.notify()
                if ended:
                    return False
        raise RuntimeError("the pool ended an adaptation's messages before its outcome")

    async def _is_pinned(self) -> bool:
        """Whether somebody asked for the job by name; else a client waits, who hears of it now."""
        row = await self._journal(Journal.get, self._row.id)
        return row is not None and row.pinned

    async def _wait_for_store(self, wait_s: float) -> bool:
        """Queue the job again, for when the disk takes what it leaves. False: it was cancelled."""
        id, info = self._row.id, self._pool.info
        needed = STATES_OF_ROOM * (0 if info is None else info.state_bytes)
        await self._journal(Journal.requeue, id, reason=STORE_FAILED)
        self._set_running(False)
        self._job.progress = {}
        self._job.notify()
        while not self._job.cancelled.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._job.cancelled.wait(), wait_s)
            if await asyncio.to_thread(lambda: self._progress.free_bytes) > needed:
                break
        return not self._job.cancelled.is_set()

    async def _take(self, message: object) -> bool:
        """Write down one message; True when it was the last."""
        id, job = self._row.id, self._job
        match message:
            case messages.AdaptationStarted(attempt=attempt):
                await self._journal(Journal.start, id, attempt=attempt)
                self._set_running(True)
                self._began_at = time.monotonic()
            case messages.AdaptationResumed():
                await self._resume(message)
            case messages.AdaptationEvent(kind=kind, data=data):
                if kind != "progress":
                    await self._journal(Journal.add_event, id, kind, data)
                known = {name: data[name] for name in PROGRESS_FIELDS if name in data}
                if kind == "step":
                    self._metrics.observe_step(data)
                    known = {"phase": "adapt", **known}
                job.progress = {**job.progress, **known}
                self._enter(job.progress.get("phase"))
            case messages.AdaptationRead(entropies=entropies):
                await self._journal(study_journal.add_reading, id, entropies)
            case messages.AdaptationBranches(steps=steps):
                for step in steps:
                    await self._journal(study_journal.add_step, id, step)
            case messages.AdaptationRequeued(attempt=attempt, reason=reason):
                await self._journal(Journal.requeue, id, reason=reason, attempt=attempt)
                self._set_running(False)
                job.progress = {}
            case messages.AdaptationDone(status=status, result=result, usage=usage, nbytes=nbytes):
                if self._row.method["type"] != IMPORT:  # else another server studied
                    self._metrics.observe_result(result, usage, self._row.num_tokens)
                await self._end(status, result=result, usage=usage, nbytes=nbytes)
                return True
            case messages.AdaptationFailed(code=code, message=text, phase=phase):
                if code == "deadline_exceeded":
                    self._metrics.deadlines.labels(phase=phase).inc()
                await self._end("failed", error=(code, text))
                return True
        return False

    async def _resume(self, resumed: messages.AdaptationResumed) -> None:
        """Write down the steps whose events died with a process, then where the job goes on."""
        id = self._row.id
        known = await self._journal(Journal.last_step, id)
        for data in resumed.events[known:]:
            await self._journal(Journal.add_event, id, "step", data)
            self._metrics.observe_step(data)
        place = {"step": resumed.step, "steps": resumed.steps}
        await self._journal(Journal.add_event, id, "resumed", place)
        self._job.progress = {"phase": "resume", **place}
        self._enter("resume")

    def _set_running(self, running: bool) -> None:
        if self._job.running != running:
            self._job.running = running
            sign = 1 if running else -1
            self._metrics.running.labels(kind="adaptation").inc(sign)
            self._metrics.waiting.labels(kind="adaptation").inc(-sign)

    def _enter(self, phase: str | None) -> None:
        """Measure the phase that this one follows."""
        if phase == self._phase:
            return
        now = time.monotonic()
        if self._phase is not None:
            passed = now - self._phase_began_at
            self._metrics.phase_duration.labels(phase=self._phase).observe(passed)
        self._phase, self._phase_began_at = phase, now

    async def _end(
        self,
        status: str,
        *,
        error: tuple[str, str] | None = None,
        result: dict[str, Any] | None = None,
        usage: dict[str, Any] | None = None,
        nbytes: int = 0,
    ) -> None:
        self._enter(None)
        if self._job.running:
            passed = time.monotonic() - self._began_at
            self._metrics.adaptation_duration.labels(outcome=status).observe(passed)
        self._metrics.adaptations.labels(outcome=status).inc()
        self._span.set({"imprint.outcome": status, **({"error.type": error[0]} if error else {})})
        logger.info("adaptation %s: %s", self._row.id, error[0] if error else status)
        await self._journal(
            Journal.finish,
            self._row.id,
            status,
            error={"message": error[1], "code": error[0], "param": None} if error else None,
            result=result,
            usage=usage,
            nbytes=nbytes,
            progress=self._job.progress,
        )
        try:
            await asyncio.to_thread(self._progress.delete, self._row.id)
        except OSError as error:  # the next start tries again
            logger.warning("the checkpoint of %s is not deleted: %s", self._row.id, error)


def _store_failed(message: messages.WorkMessage) -> bool:
    return isinstance(message, messages.AdaptationFailed) and message.code == STORE_FAILED
