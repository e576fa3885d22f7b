"""Which worker gets a piece of work: adapters at hand, then free memory, then the shortest queue.

Rules over what heartbeats and the pool itself say; sends nothing. Who holds which adapter is what
the pool has seen: a worker may have moved one out of its memory since, and loads it again then.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from imprint.server.messages import Adapt, Generate
from imprint.server.worker_process import WorkerProcess

PARTS = 8
"""Free memory is compared in so many parts of the whole: to the byte, it would always differ, and
by a heartbeat's age it would send all that arrives to the same worker."""
MAX_KNOWN = 65_536


class Residency:
    """Which adapters each worker has made or loaded, the latest last."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[str, None]] = {}

    def note(self, worker: str, adapter_id: str) -> None:
        """A worker has it in memory now."""
        held = self._held.setdefault(worker, OrderedDict())
        held[adapter_id] = None
        held.move_to_end(adapter_id)
        if len(held) > MAX_KNOWN:
            held.popitem(last=False)

    def holds(self, worker: str, adapter_id: str) -> bool:
        """Whether a worker is known to have it."""
        return adapter_id in self._held.get(worker, ())

    def forget_worker(self, worker: str) -> None:
        """It has died, and its memory with it."""
        self._held.pop(worker, None)

    def forget_adapter(self, adapter_id: str) -> None:
        """It is being deleted."""
        for held in self._held.values():
            held.pop(adapter_id, None)


@dataclass(slots=True)
class Load:
    """What the pool has given to one worker and not heard the end of."""

    adaptations: int = 0
    sequences: int = 0

    def add(self, message: Adapt | Generate) -> None:
        """Count work."""
        if isinstance(message, Adapt):
            self.adaptations += 1
        else:
            self.sequences += len(message.prompts)


def choose(
    message: Adapt | Generate,
    workers: Iterable[WorkerProcess],
    loads: dict[str, Load],
    residency: Residency,
) -> WorkerProcess | None:
    """The best of these workers; None if there is none.

    A worker with the adapter at hand is preferred as long as it has a slot free: beyond that,
    loading it elsewhere costs less than waiting.
    """

    def rank(worker: WorkerProcess) -> tuple[bool, int, int]:
        load = loads[worker.name]
        away = not _at_hand(message, worker, load, residency)
        return away, -_free_parts(message, worker), load.adaptations + load.sequences

    return min(workers, key=rank, default=None)


def _at_hand(
    message: Adapt | Generate, worker: WorkerProcess, load: Load, residency: Residency
) -> bool:
    if isinstance(message, Adapt) or message.adapter_id is None or worker.ready is None:
        return False
    held = residency.holds(worker.name, message.adapter_id)
    return held and load.sequences < worker.ready.num_slots


def _free_parts(message: Adapt | Generate, worker: WorkerProcess) -> int:
    """How much of the memory for such work is free, 0 to PARTS; all, before the first heartbeat."""
    if worker.beat is None:
        return PARTS
    stats = worker.beat.stats
    if isinstance(message, Adapt):
        used, capacity = stats.adaptation_bytes, stats.adaptation_capacity_bytes
    else:
        used = sum(n for tier, n in stats.adapter_bytes.items() if tier != "disk")
        capacity = sum(n for tier, n in stats.adapter_capacity_bytes.items() if tier != "disk")
    return round(PARTS * max(capacity - used, 0) / capacity) if capacity else 0


def backlog_s(workers: Sequence[WorkerProcess], given_tokens: int, held_tokens: int) -> float:
    """Seconds until adaptations are done that are at the workers (documents of `given_tokens`
    together) and that wait for one (`held_tokens`): at the rate of late, which is the workers' own
    estimates over the documents they have."""
    beats = [worker.beat for worker in workers if worker.up and worker.beat is not None]
    if not beats:
        return 0.0
    given_s = sum(beat.stats.backlog_s for beat in beats)
    held_s = held_tokens * given_s / given_tokens if given_tokens else 0.0
    return (given_s + held_s) / len(beats)
