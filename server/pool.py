"""Workers behind one door: started, watched, restarted, and given work. The API process's side.

Knows messages and processes; knows no torch and no HTTP. Work waits here until a worker is ready;
an adaptation whose worker dies is started again once, a request is failed with `worker_died`.
Everything runs on the event loop that called `start`.
"""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    AdaptationRequeued,
    AdaptationStarted,
    Cancel,
    Drain,
    Evict,
    Evicted,
    FromWorker,
    Generate,
    Heartbeat,
    Observation,
    Observations,
    ProtocolError,
    Ready,
    RequestFailed,
    RequestMessage,
    ToWorker,
    WorkMessage,
    decode_from_worker,
    encode,
)
from imprint.server.work_stream import WorkStream
from imprint.server.worker_config import PoolConfig
from imprint.server.worker_process import WorkerProcess, WorkerStatus

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0
SETTLE_MS = 50
KILL_WAIT_S = 5.0


@dataclass(slots=True, eq=False)
class _Work:
    """One adaptation or request, from `submit` to its end."""

    id: str
    message: Adapt | Generate
    stream: WorkStream
    deadline: float | None
    worker: WorkerProcess | None = None
    started: bool = False
    """Whether its worker has begun an adaptation's first quantum."""
    cancelled: bool = False


@dataclass(slots=True)
class _Eviction:
    """Workers that have not said yet that an adapter is gone, and who waits for it."""

    waiting: set[str] = field(default_factory=set)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Pool:
    """`num_workers` processes that share one store."""

    def __init__(self, config: PoolConfig) -> None:
        self.on_observation: Callable[[Observation], None] | None = None
        """Called with every value that a worker measures."""
        self._config = config
        self._folder = tempfile.mkdtemp(prefix="imprint-")  # only this user may enter it
        self._endpoint = f"ipc://{self._folder}/pool"
        self._workers = [
            WorkerProcess(f"worker-{i}", config, self._endpoint) for i in range(config.num_workers)
        ]
        self._works: dict[str, _Work] = {}
        self._evictions: dict[str, _Eviction] = {}
        self._info: Ready | None = None
        self._closing = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers; returns before they are ready."""
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # work in flight is bounded, so the socket need not be; a message must never be dropped
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(self._endpoint)
        for worker in self._workers:
            await worker.spawn()
        self._tasks = [
            asyncio.create_task(self._receive_forever(), name="pool-receive"),
            asyncio.create_task(self._expire_forever(), name="pool-expire"),
            *(asyncio.create_task(self._keep(w), name=f"pool-{w.name}") for w in self._workers),
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
        for worker in self._workers:
            if worker.running and not await worker.wait(max(deadline - time.monotonic(), 0.01)):
                worker.kill()
                await worker.wait(KILL_WAIT_S)
        await self._settle()
        for work in list(self._works.values()):
            if isinstance(work.message, Generate):
                self._fail(work, "draining", "the server stopped before the answer was done")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def ready(self) -> bool:
        """Whether every worker is up."""
        return not self._closing.is_set() and all(worker.up for worker in self._workers)

    @property
    def info(self) -> Ready | None:
        """What the last worker to become ready said; None before the first."""
        return self._info

    def workers(self) -> list[WorkerStatus]:
        """One status per worker."""
        return [worker.status() for worker in self._workers]

    # ---- work ----------------------------------------------------------------------------------

    def submit(self, work: Adapt | Generate) -> WorkStream:
        """The messages about this work, in order, until its end; closing it cancels the work.

        Work is registered at once; an id must not be in flight already.
        """
        id = _id(work)
        if id in self._works:
            raise ValueError(f"{id} is in flight already")
        deadline = None if work.timeout_s is None else time.monotonic() + work.timeout_s
        entry = _Work(id, work, WorkStream(work, lambda: self._abandon(id)), deadline)
        self._works[id] = entry
        if isinstance(work, Generate) and self._closing.is_set():
            self._fail(entry, "draining", "the server is stopping")
        elif isinstance(work, Generate) and self._num_held() > self._config.max_waiting_requests:
            self._fail(entry, "queue_full", "too many requests wait for a worker to be ready")
        else:
            self._dispatch()
        return entry.stream

    async def cancel(self, id: str) -> None:
        """Stop a job or request within a quantum; its stream then says so. Unknown: no-op."""
        work = self._works.get(id)
        if work is None or work.cancelled:
            return
        work.cancelled = True
        if work.worker is None:
            self._put_cancelled(work)
        else:
            self._send(work.worker, Cancel(id=id))

    async def evict(self, adapter_id: str) -> None:
        """Return when no worker's memory and no file holds the adapter."""
        work = self._works.get(adapter_id)
        if work is not None:
            work.cancelled = True  # no dying worker brings it back
            if work.worker is None:
                self._put_cancelled(work)
        eviction = self._evictions.setdefault(adapter_id, _Eviction())
        eviction.waiting = {worker.name for worker in self._workers}
        for worker in self._workers:
            if worker.ready is not None:
                self._send(worker, Evict(adapter_id=adapter_id))
        await eviction.done.wait()

    def _abandon(self, id: str) -> None:
        """The consumer closed the stream before the work's end. The id is free when that comes."""
        work = self._works[id]
        work.cancelled = True
        if work.worker is None:
            del self._works[id]
        else:
            self._send(work.worker, Cancel(id=id))

    def _num_held(self) -> int:
        held = (work for work in self._works.values() if work.worker is None)
        return sum(isinstance(work.message, Generate) for work in held)

    # ---- routing -------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give waiting work, in order of arrival, to the workers that can take it."""
        if self._closing.is_set():
            return
        for work in list(self._works.values()):
            if work.worker is None and (worker := self._choose(work)) is not None:
                work.worker, work.started = worker, False
                self._send(worker, _with_timeout(work))

    def _choose(self, work: _Work) -> WorkerProcess | None:
        """The worker with the least work in flight, among those that can take this."""
        loads = {worker.name: 0 for worker in self._workers}
        for other in self._works.values():
            if other.worker is not None:
                loads[other.worker.name] += 1
        able = [w for w in self._workers if w.up and self._has_room(w, work.message)]
        return min(able, key=lambda worker: loads[worker.name], default=None)

    def _has_room(self, worker: WorkerProcess, message: Adapt | Generate) -> bool:
        if isinstance(message, Generate):
            return True
        studying = [
            work.message
            for work in self._works.values()
            if work.worker is worker and isinstance(work.message, Adapt)
        ]
        # What may have killed a worker is tried again alone, so that it takes nobody with it.
        if message.attempt > 1 or any(other.attempt > 1 for other in studying):
            return not studying
        return len(studying) < self._config.worker_window

    def _send(self, worker: WorkerProcess, message: ToWorker) -> None:
        if self._socket is not None and worker.ready is not None:
            sent = self._socket.send_multipart([worker.identity, encode(message)])
            asyncio.ensure_future(sent).add_done_callback(_log_unsent)

    # ---- what workers say ----------------------------------------------------------------------

    async def _receive_forever(self) -> None:
        assert self._socket is not None
        while True:
            identity, frame = await self._socket.recv_multipart()
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
                for adapter_id, eviction in self._evictions.items():
                    if worker.name in eviction.waiting:
                        self._send(worker, Evict(adapter_id=adapter_id))
                self._dispatch()
            case Heartbeat():
                pass
            case Observations(values=values):
                if self.on_observation is not None:
                    for value in values:
                        self.on_observation(value)
            case Evicted(adapter_id=adapter_id):
                self._take_evicted(worker, adapter_id)
            case _:
                self._route(worker, message)

    def _take_evicted(self, worker: WorkerProcess, adapter_id: str) -> None:
        eviction = self._evictions.get(adapter_id)
        if eviction is not None:
            eviction.waiting.discard(worker.name)
            if not eviction.waiting:
                eviction.done.set()
                del self._evictions[adapter_id]

    def _route(self, worker: WorkerProcess, message: WorkMessage) -> None:
        """To the stream of the work it is about, unless that is now another worker's."""
        id = message.request_id if isinstance(message, RequestMessage) else message.adaptation_id
        work = self._works.get(id)
        if work is None or work.worker is not worker:
            return
        if isinstance(message, AdaptationStarted):
            work.started = True
        work.stream.put(message)
        if work.stream.ended:
            del self._works[id]
            if isinstance(work.message, Adapt):
                self._dispatch()

    def _fail(self, work: _Work, code: str, text: str) -> None:
        self._works.pop(work.id, None)
        if isinstance(work.message, Adapt):
            work.stream.put(AdaptationFailed(adaptation_id=work.id, code=code, message=text))
        else:
            work.stream.put(RequestFailed(request_id=work.id, code=code, message=text))

    def _put_cancelled(self, work: _Work) -> None:
        if isinstance(work.message, Adapt):
            self._works.pop(work.id, None)
            work.stream.put(AdaptationDone(adaptation_id=work.id, status="cancelled"))
        else:
            self._fail(work, "cancelled", "the request was cancelled")

    # ---- watching ------------------------------------------------------------------------------

    async def _keep(self, worker: WorkerProcess) -> None:
        """Watch one worker for ever; after its death, settle its work and start it again."""
        while not self._closing.is_set():
            if not await worker.wait(WATCH_INTERVAL_S):
                worker.judge()
                continue
            if self._closing.is_set():
                return
            await self._settle()
            self._orphan(worker, worker.bury())
            self._dispatch()
            await worker.back_off()
            if not self._closing.is_set():
                await worker.spawn()

    async def _settle(self) -> None:
        """Take in what a worker that has ended had sent before."""
        assert self._socket is not None
        while await self._socket.poll(SETTLE_MS):
            await asyncio.sleep(0)

    def _orphan(self, worker: WorkerProcess, reason: str) -> None:
        """Decide on everything that a dead worker was doing."""
        for work in list(self._works.values()):
            if work.worker is not worker:
                continue
            work.worker = None
            if work.cancelled:
                self._put_cancelled(work)
            elif isinstance(work.message, Generate):
                self._fail(work, "worker_died", "the worker died under this request; try again")
            elif work.started and work.message.attempt >= self._config.max_attempts:
                text = f"the worker died {work.message.attempt} times while it ran ({reason})"
                self._fail(work, "worker_died", text)
            elif work.started:
                attempt = work.message.attempt + 1
                work.message = msgspec.structs.replace(work.message, attempt=attempt)
                work.stream.put(
                    AdaptationRequeued(adaptation_id=work.id, attempt=attempt, reason=reason)
                )

    async def _expire_forever(self) -> None:
        """Deadlines of work that no worker has yet; workers watch their own."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = time.monotonic()
            for work in list(self._works.values()):
                if work.worker is None and work.deadline is not None and now >= work.deadline:
                    self._fail(work, "deadline_exceeded", "timeout_s has passed (in queue)")


def _id(work: Adapt | Generate) -> str:
    return work.adaptation_id if isinstance(work, Adapt) else work.request_id


def _with_timeout(work: _Work) -> Adapt | Generate:
    """The message, with what is left of its time."""
    if work.deadline is None:
        return work.message
    left_s = max(work.deadline - time.monotonic(), 0.0)
    return msgspec.structs.replace(work.message, timeout_s=left_s)


def _log_unsent(sent: "asyncio.Future[Any]") -> None:
    # The worker has just died; what becomes of its work is decided when its end is noticed.
    if not sent.cancelled() and sent.exception() is not None:
        log.warning("a message could not be sent to a worker: %s", sent.exception())
