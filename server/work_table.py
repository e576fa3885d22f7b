"""Every adaptation and request of the pool: where it is, where it may go, what a death does to it.

Bookkeeping only: knows messages and which workers are up; sends nothing, starts nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from imprint.server import routing
from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    AdaptationRequeued,
    AdaptationStarted,
    Generate,
    RequestFailed,
    RequestMessage,
    WorkMessage,
)
from imprint.server.records import READY
from imprint.server.routing import Load, Residency
from imprint.server.work_stream import WorkStream
from imprint.server.worker_config import PoolConfig
from imprint.server.worker_process import WorkerProcess

MAX_WAITING_DEATHS = 3
"""Deaths of workers that a waiting adaptation outlives before it is a suspect itself."""


@dataclass(slots=True, eq=False)
class Work:
    """One adaptation or request, from `submit` to its end."""

    id: str
    message: Adapt | Generate
    stream: WorkStream
    deadline: float | None
    worker: WorkerProcess | None = None
    started: bool = False
    """Whether its worker has begun an adaptation's first quantum."""
    cancelled: bool = False
    num_deaths: int = 0
    """Workers that died while they had it."""

    def with_time_left(self) -> Adapt | Generate:
        """The message, with what is left of its time."""
        if self.deadline is None:
            return self.message
        left_s = max(self.deadline - time.monotonic(), 0.0)
        return msgspec.structs.replace(self.message, timeout_s=left_s)


class WorkTable:
    """Work by id, in order of arrival."""

    def __init__(self, config: PoolConfig, workers: Sequence[WorkerProcess]) -> None:
        self._config = config
        self._workers = workers
        self._works: dict[str, Work] = {}
        self.residency = Residency()

    def add(self, message: Adapt | Generate, on_close: Callable[[], None]) -> Work:
        """Register work. Raises ValueError if its id is in flight."""
        id = message.adaptation_id if isinstance(message, Adapt) else message.request_id
        if id in self._works:
            raise ValueError(f"{id} is in flight already")
        deadline = None if message.timeout_s is None else time.monotonic() + message.timeout_s
        work = Work(id, message, WorkStream(message, on_close), deadline)
        self._works[id] = work
        return work

    def get(self, id: str) -> Work | None:
        """The work of this id, if it is in flight."""
        return self._works.get(id)

    def drop(self, work: Work) -> None:
        """Forget work; its id is free again."""
        self._works.pop(work.id, None)

    def all(self) -> list[Work]:
        """All work in flight."""
        return list(self._works.values())

    def held(self) -> list[Work]:
        """Work that no worker has."""
        return [work for work in self._works.values() if work.worker is None]

    # ---- routing -------------------------------------------------------------------------------

    def choose(self, message: Adapt | Generate) -> WorkerProcess | None:
        """The best of the workers that can take this; see `routing.py`."""
        loads = {worker.name: Load() for worker in self._workers}
        for other in self._works.values():
            if other.worker is not None:
                loads[other.worker.name].add(other.message)
        able = [w for w in self._workers if w.up and self._has_room(w, message)]
        return routing.choose(message, able, loads, self.residency)

    def place(self, work: Work, worker: WorkerProcess) -> None:
        """Work is at a worker from now on; what it asks of an adapter brings that there."""
        work.worker, work.started = worker, False
        if isinstance(work.message, Generate) and work.message.adapter_id is not None:
            self.residency.note(worker.name, work.message.adapter_id)

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

    def route(self, worker: WorkerProcess, message: WorkMessage) -> Work | None:
        """Put a worker's message into its stream; returns the work if that was its end.

        A message about work that is now another worker's, or nobody's, is dropped.
        """
        id = message.request_id if isinstance(message, RequestMessage) else message.adaptation_id
        work = self._works.get(id)
        if work is None or work.worker is not worker:
            return None
        if isinstance(message, AdaptationStarted):
            work.started = True
        work.stream.put(message)
        if not work.stream.ended:
            return None
        if isinstance(message, AdaptationDone) and message.status in READY:
            self.residency.note(worker.name, id)
        self.drop(work)
        return work

    # ---- estimates -----------------------------------------------------------------------------

    def finish_s(self, id: str) -> float | None:
        """Seconds until an adaptation is done: its worker's estimate, or, while it waits here, when
        all before it are through. None where nobody can tell yet."""
        work = self._works.get(id)
        if work is None:
            return None
        if work.worker is not None:
            beat = work.worker.beat
            return None if beat is None else beat.stats.adaptation_finish_s.get(id)
        return self._backlog_s(until=work) or None

    def backlog_s(self) -> float:
        """Seconds until all adaptations in flight are done; 0 where nobody can tell yet."""
        return self._backlog_s(until=None)

    def _backlog_s(self, until: Work | None) -> float:
        given = held = 0
        for work in self._works.values():
            if isinstance(work.message, Adapt):
                given += len(work.message.tokens) if work.worker is not None else 0
                held += len(work.message.tokens) if work.worker is None else 0
            if work is until:
                break
        return routing.backlog_s(self._workers, given, held)

    # ---- ends that the pool decides ------------------------------------------------------------

    def fail(self, work: Work, code: str, text: str, phase: str = "") -> None:
        """End work with an error; `phase` is where a deadline struck."""
        self.drop(work)
        if isinstance(work.message, Adapt):
            failed = AdaptationFailed(adaptation_id=work.id, code=code, message=text, phase=phase)
            work.stream.put(failed)
        else:
            work.stream.put(RequestFailed(request_id=work.id, code=code, message=text, phase=phase))

    def cancel(self, work: Work) -> None:
        """End work that no worker has, because its client asked for it."""
        if isinstance(work.message, Adapt):
            self.drop(work)
            work.stream.put(AdaptationDone(adaptation_id=work.id, status="cancelled"))
        else:
            self.fail(work, "cancelled", "the request was cancelled")

    def expire(self) -> None:
        """End held work whose time is over; workers watch over what they have."""
        now = time.monotonic()
        for work in self.held():
            if work.deadline is not None and now >= work.deadline:
                self.fail(work, "deadline_exceeded", "timeout_s has passed (in queue)", "queue")

    def orphan(self, worker: WorkerProcess, reason: str) -> None:
        """Decide on everything that a dead worker had."""
        self.residency.forget_worker(worker.name)
        for work in self.all():
            if work.worker is not worker:
                continue
            work.worker = None
            if work.cancelled:
                self.cancel(work)
            elif isinstance(work.message, Generate):
                self.fail(work, "worker_died", "the worker died under this request; try again")
            else:
                self._try_again(work, work.message, reason)

    def _try_again(self, work: Work, message: Adapt, reason: str) -> None:
        """An adaptation that had begun has one attempt less; one that waited, only in the end."""
        work.num_deaths += 1
        if not work.started and work.num_deaths < MAX_WAITING_DEATHS:
            return
        if message.attempt >= self._config.max_attempts:
            text = f"the worker died under it in attempt {message.attempt} ({reason})"
            self.fail(work, "worker_died", text)
            return
        attempt = message.attempt + 1
        work.message = msgspec.structs.replace(message, attempt=attempt)
        work.stream.put(AdaptationRequeued(adaptation_id=work.id, attempt=attempt, reason=reason))
