"""Workers behind one door: started, watched, restarted, and given work. The API process's side.

Knows messages and processes; knows no torch and no HTTP. Work waits here until a worker is ready;
an adaptation whose worker dies is started again once, a request is failed with `worker_died`.
Everything runs on the event loop that called `start`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from imprint.adapters import faults
from imprint.adapters.files import FileFolder, ProgressFolder, StoreGoneError
from imprint.server.launching import Launcher, LocalLauncher
from imprint.server.messages import (
    Adapt,
    Cancel,
    Drain,
    Evict,
    Evicted,
    FromWorker,
    Generate,
    Generated,
    Heartbeat,
    Observation,
    Observations,
    ProtocolError,
    Ready,
    SpanRecord,
    Spans,
    ToWorker,
    decode_from_worker,
    encode,
)
from imprint.server.pool_wire import Wire
from imprint.server.ray_launching import RayLauncher
from imprint.server.work_stream import WorkStream
from imprint.server.work_table import Work, WorkTable
from imprint.server.worker_config import PoolConfig
from imprint.server.worker_process import WorkerProcess, WorkerStatus

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0
KILL_WAIT_S = 5.0
EVICT_AGAIN_S = 5.0


@dataclass(slots=True)
class _Eviction:
    """Workers that have not said yet that an adapter is gone, and who waits for it."""

    waiting: set[str] = field(default_factory=set)
    asked_at: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Pool:
    """`num_workers` processes that share one store."""

    def __init__(self, config: PoolConfig) -> None:
        self.on_observation: Callable[[Observation], None] | None = None
        """Called with every value that a worker measures."""
        self.on_span: Callable[[SpanRecord], None] | None = None
        """Called with every span of a trace that a worker reports."""
        self._config = config
        num_workers, device = config.num_workers, config.worker.device
        self._launcher = _launcher_of(config)
        self._workers = [
            WorkerProcess(f"worker-{i}", config, self._launcher.device(device, i, num_workers))
            for i in range(num_workers)
        ]
        self._table = WorkTable(config, self._workers)
        self._evictions: dict[str, _Eviction] = {}
        self._folders: list[FileFolder | ProgressFolder] = []
        self._evict_at_start: dict[str, set[str]] = {}
        self._info: Ready | None = None
        self._closing = asyncio.Event()
        self._wire: Wire | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []

    # ---- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers; returns before they are ready. Raises OSError, and LaunchError where
        none can be started."""
        store = self._config.worker.store
        self._folders = [FileFolder(store), ProgressFolder(store)]  # made here, and never again
        host = await self._launcher.open()
        try:
            wire = self._wire = Wire(host, self._config.pool_port)
            self._tasks = [
                asyncio.create_task(self._receive_forever(wire), name="pool-receive"),
                asyncio.create_task(self._expire_forever(), name="pool-expire"),
            ]
            for worker in self._workers:
                await worker.spawn(self._launcher, wire)
        except OSError:
            await self.close(grace_s=0)
            raise
        self._keepers = [
            asyncio.create_task(self._keep(w, wire), name=f"pool-{w.name}") for w in self._workers
        ]

    async def close(self, *, grace_s: float) -> None:
        """Let running answers finish for `grace_s`, then end every worker. Idempotent.

        Requests that are not finished fail with `draining`; adaptations get no further message,
        because their jobs go on after a restart.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        deadline = time.monotonic() + grace_s
        for worker in self._workers:
            self._send(worker, Drain())
        await asyncio.gather(*self._keepers)  # from here on nobody starts a worker
        for worker in self._workers:
            left_s = max(deadline - time.monotonic(), 0.01) if worker.ready else 0.01
            if worker.running and not await worker.wait(left_s):
                worker.kill()
                await worker.wait(KILL_WAIT_S)
        if self._wire is not None:
            await self._wire.settle()
        for work in self._table.all():
            if isinstance(work.message, Generate):
                self._table.fail(work, "draining", "the server stopped before the answer was done")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        await self._launcher.close()

    @property
    def ready(self) -> bool:
        """Whether a worker is up: the others are started again meanwhile, and one serves all."""
        return not self._closing.is_set() and any(worker.up for worker in self._workers)

    @property
    def info(self) -> Ready | None:
        """What the last worker to become ready said; None before the first."""
        return self._info

    def workers(self) -> list[WorkerStatus]:
        """One status per worker."""
        return [worker.status() for worker in self._workers]

    def finish_s(self, id: str) -> float | None:
        """Estimated seconds to an adaptation's end; None where nobody can tell yet."""
        return self._table.finish_s(id)

    def backlog_s(self) -> float:
        """Estimated seconds to the end of all adaptations; 0 where nobody can tell yet."""
        return self._table.backlog_s()

    # ---- work ----------------------------------------------------------------------------------

    def submit(self, work: Adapt | Generate) -> WorkStream:
        """The messages about this work, in order, until its end; closing it cancels the work.

        Work is registered at once. Raises ValueError if its id is in flight already.
        """
        entry = self._table.add(work, lambda: self._abandon(entry))
        if isinstance(work, Generate):
            held = sum(isinstance(other.message, Generate) for other in self._table.held())
            if self._closing.is_set():
                self._table.fail(entry, "draining", "the server is stopping")
            elif not self.ready and held > self._config.max_waiting_requests:
                text = "too many requests wait for a worker to be ready"
                self._table.fail(entry, "queue_full", text)
        self._dispatch()
        return entry.stream

    async def cancel(self, id: str) -> None:
        """Stop a job or request within a quantum; its stream then says so. Unknown: no-op."""
        work = self._table.get(id)
        if work is None or work.cancelled:
            return
        work.cancelled = True
        if work.worker is None:
            self._table.cancel(work)
        else:
            self._send(work.worker, Cancel(id=id))

    async def evict(self, adapter_id: str) -> None:
        """Return when no worker's memory and no file holds the adapter."""
        work = self._table.get(adapter_id)
        if work is not None:
            work.cancelled = True  # no dying worker brings it back
            if work.worker is None:
                self._table.cancel(work)
        self._table.residency.forget_adapter(adapter_id)
        eviction = self._evictions.setdefault(adapter_id, _Eviction())
        eviction.waiting = {worker.name for worker in self._workers if worker.ready is not None}
        # one that starts holds nothing yet; it may have counted a file that is about to go
        for worker in self._workers:
            if worker.ready is None:
                self._evict_at_start.setdefault(worker.name, set()).add(adapter_id)
        self._ask_to_evict(adapter_id, eviction)
        self._settle_eviction(adapter_id, eviction)
        await eviction.done.wait()
        await self._delete_files(adapter_id)

    async def _delete_files(self, adapter_id: str) -> None:
        """What workers leave that died before they could delete it."""
        while True:
            try:
                for folder in self._folders:
                    await asyncio.to_thread(folder.delete, adapter_id)
            except StoreGoneError as error:
                log.warning("%s is not deleted yet: %s", adapter_id, error)
                await asyncio.sleep(EVICT_AGAIN_S)
            else:
                return

    def _ask_to_evict(self, adapter_id: str, eviction: _Eviction) -> None:
        eviction.asked_at = time.monotonic()
        for worker in self._workers:
            if worker.name in eviction.waiting:
                self._send(worker, Evict(adapter_id=adapter_id))

    def _abandon(self, work: Work) -> None:
        """The consumer closed the stream before the work's end. The id is free when that comes."""
        work.cancelled = True
        if work.worker is None:
            self._table.drop(work)
        else:
            self._send(work.worker, Cancel(id=work.id))

    def _dispatch(self) -> None:
        """Give held work, in order of arrival, to the workers that can take it."""
        if self._closing.is_set():
            return
        for work in self._table.held():
            if (worker := self._table.choose(work.message)) is not None:
                self._table.place(work, worker)
                self._send(worker, work.with_time_left())

    def _send(self, worker: WorkerProcess, message: ToWorker) -> None:
        if self._wire is not None and worker.ready is not None:
            faults.at("message_send")
            sent = self._wire.socket.send_multipart([worker.identity, encode(message)])
            asyncio.ensure_future(sent).add_done_callback(_log_unsent)

    # ---- what workers say ----------------------------------------------------------------------

    async def _receive_forever(self, wire: Wire) -> None:
        while True:
            identity, frame = await wire.socket.recv_multipart()
            faults.at("message_receive")
            worker = next((w for w in self._workers if w.identity == identity), None)
            if worker is None:
                continue  # of a process that has been replaced
            try:
                message = decode_from_worker(frame)
            except ProtocolError:
                log.exception("worker %s sent what nobody understands", worker.name)
                continue
            worker.heard(message)
            self._take(worker, message)

    def _take(self, worker: WorkerProcess, message: FromWorker) -> None:
        match message:
            case Ready():
                self._info = message
                for adapter_id in self._evict_at_start.pop(worker.name, ()):
                    self._send(worker, Evict(adapter_id=adapter_id))
                self._dispatch()
            case Heartbeat():
                pass
            case Observations(values=values):
                if self.on_observation is not None:
                    for value in values:
                        self.on_observation(value)
            case Spans(values=spans):
                if self.on_span is not None:
                    for span in spans:
                        self.on_span(span)
            case Evicted(adapter_id=adapter_id):
                self._take_evicted(worker, adapter_id)
            case Generated(values=parts):
                for part in parts:
                    self._table.route(worker, part)
            case _:
                ended = self._table.route(worker, message)
                if ended is not None and isinstance(ended.message, Adapt):
                    self._dispatch()

    def _take_evicted(self, worker: WorkerProcess, adapter_id: str) -> None:
        eviction = self._evictions.get(adapter_id)
        if eviction is not None:
            eviction.waiting.discard(worker.name)
            self._settle_eviction(adapter_id, eviction)

    def _settle_eviction(self, adapter_id: str, eviction: _Eviction) -> None:
        if not eviction.waiting and not eviction.done.is_set():
            eviction.done.set()
            del self._evictions[adapter_id]

    # ---- watching ------------------------------------------------------------------------------

    async def _keep(self, worker: WorkerProcess, wire: Wire) -> None:
        """Watch one worker until the pool closes; after its death, settle its work and restart."""
        while not self._closing.is_set():
            if not await worker.wait(WATCH_INTERVAL_S):
                worker.judge()
                continue
            if self._closing.is_set():
                return
            await wire.settle()
            self._table.orphan(worker, worker.bury())
            for adapter_id, eviction in list(self._evictions.items()):
                if worker.name in eviction.waiting:  # its memory is gone with it
                    self._evict_at_start.setdefault(worker.name, set()).add(adapter_id)
                    self._take_evicted(worker, adapter_id)
            self._dispatch()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), worker.next_backoff_s())
            if not self._closing.is_set():
                try:
                    await worker.spawn(self._launcher, wire)
                except OSError:  # no memory for a process, say: the loop comes back to it
                    log.exception("worker %s cannot be started", worker.name)

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._table.expire()
            for adapter_id, eviction in self._evictions.items():
                # a worker that could not delete a file, because its folder is away, says nothing
                if time.monotonic() - eviction.asked_at > EVICT_AGAIN_S:
                    self._ask_to_evict(adapter_id, eviction)


def _launcher_of(config: PoolConfig) -> Launcher:
    return RayLauncher(config.ray_address) if config.pool == "ray" else LocalLauncher()


def _log_unsent(sent: "asyncio.Future[Any]") -> None:
    # The worker has just died; what becomes of its work is decided when its end is noticed.
    if not sent.cancelled() and sent.exception() is not None:
        log.warning("a message could not be sent to a worker: %s", sent.exception())
