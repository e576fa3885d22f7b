"""What the services ask of a worker pool. Knows messages; knows no processes and no sockets.

`server/pool.py` runs worker processes behind it; a pool over another transport needs these and no
more.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from imprint.server.messages import (
    Adapt,
    Generate,
    Heartbeat,
    Observation,
    Ready,
    SpanRecord,
    WorkMessage,
)


class WorkerStatus(Protocol):
    """One worker, as the pool sees it."""

    @property
    def name(self) -> str:
        """Stable over restarts."""

    @property
    def up(self) -> bool:
        """Ready, and its last heartbeat is young."""

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the last heartbeat."""

    @property
    def restarts(self) -> dict[str, int]:
        """Times it was replaced, by reason."""

    @property
    def stats(self) -> Heartbeat | None:
        """The last heartbeat."""


class Pool(Protocol):
    """Workers behind one door."""

    on_observation: Callable[[Observation], None] | None
    """Called with each value that a worker measures."""

    on_span: Callable[[SpanRecord], None] | None
    """Called with each span of a trace that a worker reports."""

    @property
    def ready(self) -> bool:
        """Whether a worker is up that can take work."""

    @property
    def info(self) -> Ready | None:
        """What a worker said when it had loaded the model; None before that."""

    def workers(self) -> Sequence[WorkerStatus]:
        """One status per worker."""

    def finish_s(self, id: str) -> float | None:
        """Estimated seconds to an adaptation's end; None where nobody can tell yet."""

    def backlog_s(self) -> float:
        """Estimated seconds to the end of all adaptations; 0 where nobody can tell yet."""

    async def start(self) -> None:
        """Spawn the workers; returns before they are ready."""

    async def close(self, *, grace_s: float) -> None:
        """Let running answers finish for `grace_s`, then end every worker. Idempotent."""

    def submit(self, work: Adapt | Generate) -> AsyncGenerator[WorkMessage, None]:
        """The messages about this work, in order, until its end.

        The work is registered when this returns, not when it is first iterated; closing the
        generator before the end cancels the work. A dead worker ends a request with the code
        "worker_died"; an adaptation is taken up again once (`AdaptationRequeued`).
        """

    async def cancel(self, id: str) -> None:
        """Stop a job or a request within a quantum; its stream then says so. Unknown: no-op."""

    async def evict(self, adapter_id: str) -> None:
        """Return when no memory and no file holds the adapter."""
