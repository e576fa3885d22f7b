"""What runs next: a pure function of numbers and time. No torch, no tokens, no text.

Every step decodes all running sequences; then prompts waiting for prefill share `step_tokens`
by turns, and at most one quantum runs, of one job or of several whose quanta are of one kind.
While answers are on their way, quanta get `adaptation_share` of the time. Among jobs, focus runs
come first (with every fourth quantum left to adaptations), and within a class the least served in
tokens, weighted by priority, is next. Of those that are nearly as little served, one at an early
stage goes first: so jobs that came at different times fall into step and can share their quanta.

Limit: quantum costs are known only afterwards, so the share is kept on average, not in each step.
"""

import math
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from imprint.server.sequence import Job, Request, Sequence

RATE_SMOOTHING = 0.2
PREFILL_PIECE = 32
"""Tokens of a prompt that are read in one go, if there are so many: smaller pieces of more prompts
cost more, because the operators work on chunks and every prompt brings a state."""
LEAD_TOKENS = 2048
"""Served tokens by which a job may run ahead of the least served, to fall into step with others."""
ADAPTATION_EVERY = 4
"""At least one quantum in so many goes to an adaptation while focus runs compete with it."""


class QueueFullError(RuntimeError):
    """The request queue is at its bound; the client should come back later."""


class TooLargeError(ValueError):
    """Work that would not fit into this worker even if it were alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of one engine; see `WorkerConfig` for their meaning."""

    num_slots: int
    step_tokens: int
    adaptation_share: float
    max_running_adaptations: int
    max_batched_adaptations: int = 1
    max_quantum_s: float = math.inf
    adaptation_bytes: int
    max_waiting_requests: int

    def __post_init__(self) -> None:
        counts = ("num_slots", "step_tokens", "max_running_adaptations", "max_batched_adaptations")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.adaptation_share <= 1:
            raise ValueError(f"adaptation_share must lie in (0, 1], got {self.adaptation_share}")


@dataclass(frozen=True, slots=True)
class Expired:
    """A deadline has passed; `phase` is where it caught the work: queue, quantum or decode."""

    id: str
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Adaptations and requests by state."""

    adaptations_waiting: int
    adaptations_running: int
    requests_waiting: int
    requests_running: int
    adaptation_bytes: int
    """What all adaptations need, by estimate."""


@dataclass(slots=True)
class Plan:
    """One step's work, in the order in which it is to be done."""

    expired: list[Expired] = field(default_factory=list)
    begin: list[Request] = field(default_factory=list)
    """Admitted requests that have not been `begun` yet: their slots are reserved."""
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    """Sequences and how many of their unread prompt tokens to read."""
    quantum: list[Job] = field(default_factory=list)
    """Jobs whose next quanta are one batch; none, or a single one, as a rule."""


class Scheduler:
    """Keeps every job and request of a worker, from arrival to the end."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.draining = False
        self._waiting_jobs: list[Job] = []
        self._running_jobs: dict[str, Job] = {}
        self._waiting: deque[Request] = deque()
        self._admitted: dict[str, Request] = {}
        self._unbegun: dict[str, Request] = {}
        self._ready: dict[str, Request] = {}
        self._next_quantum_at = 0.0
        self._focus_streak = 0
        self._prefill_turn = 0
        self._seconds_per_token: float | None = None
        self._stage_seconds: dict[int, float] = {}

    # ---- arrivals and departures -----------------------------------------------------------

    def add_job(self, job: Job) -> None:
        """Queue a job. Raises `TooLargeError` if it can never run here."""
        if job.num_bytes > self.config.adaptation_bytes:
            raise TooLargeError(
                f"needs about {job.num_bytes} bytes, this worker may use "
                f"{self.config.adaptation_bytes}"
            )
        if job.focus:
            self._start(job)
        else:
            self._waiting_jobs.append(job)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises `QueueFullError`, or `TooLargeError` for too many sequences."""
        if request.num_slots > self.config.num_slots:
            raise TooLargeError(
                f"the request has {request.num_slots} sequences, this worker has "
                f"{self.config.num_slots} slots"
            )
        if len(self._waiting) >= self.config.max_waiting_requests:
            raise QueueFullError(f"{len(self._waiting)} requests are waiting already")
        self._waiting.append(request)

    def begun(self, request_id: str) -> None:
        """The engine has taken a request up; it is not offered to begin again."""
        self._unbegun.pop(request_id, None)

    def activate(self, request_id: str) -> None:
        """The sequences of an admitted request may be prefilled: adapter loaded, focus run done."""
        self._running_jobs.pop(request_id, None)
        self._ready[request_id] = self._admitted[request_id]

    def remove(self, id: str) -> None:
        """Forget a job or request, finished or not; its reserved slots are free again."""
        for table in (self._running_jobs, self._admitted, self._ready, self._unbegun):
            table.pop(id, None)
        self._waiting_jobs = [job for job in self._waiting_jobs if job.id != id]
        self._waiting = deque(request for request in self._waiting if request.id != id)

    def charge(
        self, jobs: Seq[Job], num_tokens: int, duration_s: float, now: float, *, stage: int = 0
    ) -> None:
        """Account for a quantum that has just run: `num_tokens` of each job, at `stage`."""
        for job in jobs:
            job.served_tokens += num_tokens
            # A quantum without tokens (the beginning of a study) still takes its turn.
            job.virtual_tokens += max(num_tokens, 1) / job.weight
        self.rest_after(duration_s, now)
        self._focus_streak = self._focus_streak + 1 if jobs[0].focus else 0
        if num_tokens > 0:
            rate = duration_s / (num_tokens * len(jobs))
            self._seconds_per_token = _smoothed(self._seconds_per_token, rate)
            self._stage_seconds[stage] = _smoothed(self._stage_seconds.get(stage), rate)

    def rest_after(self, duration_s: float, now: float) -> None:
        """A quantum took so long, with all that followed from it: the next one waits its share."""
        share = self.config.adaptation_share
        self._next_quantum_at = now + duration_s * (1 - share) / share

    # ---- the plan --------------------------------------------------------------------------

    def schedule(self, now: float) -> Plan:
        """What to do at time `now`. Expired work is removed from the queues, and only named."""
        plan = Plan(expired=self._expire(now))
        self._admit_requests()
        self._admit_jobs()
        plan.begin = list(self._unbegun.values())
        sequences = [s for request in self._ready.values() for s in request.sequences]
        plan.decode = [sequence for sequence in sequences if sequence.decoding]
        plan.prefill = self._share_prefill([s for s in sequences if s.num_unread])
        answering = bool(plan.decode or plan.prefill)
        # a request that begins now is prefilled in the next step: no quantum in between
        if not plan.begin and (not answering or now >= self._next_quantum_at):
            plan.quantum = self._next_jobs()
        return plan

    def _expire(self, now: float) -> list[Expired]:
        expired = []
        for item, phase in self._phases():
            if item.deadline is not None and now >= item.deadline:
                expired.append(Expired(item.id, phase))
        for late in expired:
            self.remove(late.id)
        return expired

    def _phases(self) -> Iterator[tuple[Job | Request, str]]:
        yield from ((job, "queue") for job in self._waiting_jobs)
        yield from ((job, "quantum") for job in self._running_jobs.values())
        yield from ((request, "queue") for request in self._waiting)
        for request in self._admitted.values():
            yield request, "decode" if request.id in self._ready else "quantum"

    def _admit_requests(self) -> None:
        """First come, first served, while slots can be reserved for all sequences of a request."""
        free = self.config.num_slots - sum(r.num_slots for r in self._admitted.values())
        while self._waiting and self._waiting[0].num_slots <= free:
            request = self._waiting.popleft()
            free -= request.num_slots
            self._admitted[request.id] = self._unbegun[request.id] = request

    def _admit_jobs(self) -> None:
        """By priority, then arrival; the head waits for memory rather than be overtaken."""
        if self.draining:
            return
        while self._waiting_jobs:
            running = [job for job in self._running_jobs.values() if not job.focus]
            head = max(self._waiting_jobs, key=lambda job: (job.weight, -job.arrived))
            used_bytes = sum(job.num_bytes for job in self._running_jobs.values())
            fits = used_bytes + head.num_bytes <= self.config.adaptation_bytes
            if len(running) >= self.config.max_running_adaptations or not (fits or not running):
                return
            self._waiting_jobs.remove(head)
            self._start(head)

    def _start(self, job: Job) -> None:
        # A newcomer starts level with the least served, so that it cannot claim the past.
        served = [j.virtual_tokens for j in self._running_jobs.values() if j.focus == job.focus]
        job.virtual_tokens = min(served, default=0.0)
        job.running = True
        self._running_jobs[job.id] = job

    def _share_prefill(self, pending: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Shares of `step_tokens`, equal but for a least size; those who have waited longest come
        first, and take what short prompts leave over."""
        self._prefill_turn += 1
        for sequence in pending:
            sequence.prefill_turn = sequence.prefill_turn or self._prefill_turn
        pending = sorted(pending, key=lambda sequence: sequence.prefill_turn)
        budget = self.config.step_tokens
        piece = max(budget // max(len(pending), 1), PREFILL_PIECE)
        shares: dict[int, int] = {}
        for most in (piece, budget):
            for place, sequence in enumerate(pending):
                share = min(sequence.num_unread, most, shares.get(place, 0) + budget)
                budget -= share - shares.get(place, 0)
                if share:
                    shares[place] = share
                    sequence.prefill_turn = self._prefill_turn + 1
        return [(pending[place], share) for place, share in shares.items()]

    def _next_jobs(self) -> list[Job]:
        focus = [job for job in self._running_jobs.values() if job.focus]
        adapt = [job for job in self._running_jobs.values() if not job.focus]
        if self.draining:
            adapt = []
        if focus and adapt:
            adapt_turn = self._focus_streak >= ADAPTATION_EVERY - 1
            focus, adapt = ([], adapt) if adapt_turn else (focus, [])
        pool = sorted(focus or adapt, key=lambda job: (job.virtual_tokens, job.arrived))
        if not pool:
            return []
        bound = pool[0].virtual_tokens + LEAD_TOKENS
        head = min((job for job in pool if job.virtual_tokens <= bound), key=lambda job: job.stage)
        return self._with_mates(head, pool)

    def _with_mates(self, head: Job, pool: list[Job]) -> list[Job]:
        """The job and those that can share its quantum, the least served first, as far as the
        batch and the quantum's time allow."""
        rate = self._stage_seconds.get(head.stage)
        if head.kind is None or rate is None:  # nobody knows yet how long it takes
            return [head]
        most = self.config.max_batched_adaptations
        if head.most_together is not None:
            most = min(most, head.most_together)
        quantum_s = rate * head.quantum_tokens
        if quantum_s * most > self.config.max_quantum_s:
            most = max(1, int(self.config.max_quantum_s / quantum_s))
        mates = [job for job in pool if job is not head and job.kind == head.kind]
        return [head, *mates[: most - 1]]

    # ---- what the heartbeat tells -----------------------------------------------------------

    @property
    def answering(self) -> bool:
        """Whether any request is waiting or on its way."""
        return bool(self._waiting or self._admitted)

    def counts(self) -> Counts:
        """How much is waiting and running; a request runs once one of its sequences decodes."""
        adaptations = sum(not job.focus for job in self._running_jobs.values())
        decoding = sum(request.decoding for request in self._ready.values())
        return Counts(
            adaptations_waiting=len(self._waiting_jobs),
            adaptations_running=adaptations,
            requests_waiting=len(self._waiting) + len(self._admitted) - decoding,
            requests_running=decoding,
            adaptation_bytes=sum(
                job.num_bytes for job in (*self._waiting_jobs, *self._running_jobs.values())
            ),
        )

    def finish_estimates(self) -> tuple[dict[str, float], float]:
        """Seconds until each adaptation is done, and until all are, at the rate of late.

        Running jobs share the engine, so each ends when as much has been served to all of them
        as it needs itself; waiting ones start when the running ones are through.
        """
        if self._seconds_per_token is None:
            return {}, 0.0
        running = [job for job in self._running_jobs.values() if not job.focus]
        finish: dict[str, float] = {}
        for job in running:
            tokens = sum(min(j.remaining_tokens, job.remaining_tokens) for j in running)
            finish[job.id] = tokens * self._seconds_per_token
        total = sum(job.remaining_tokens for job in running)
        for job in sorted(self._waiting_jobs, key=lambda job: (-job.weight, job.arrived)):
            total += job.remaining_tokens
            finish[job.id] = total * self._seconds_per_token
        return finish, total * self._seconds_per_token


def _smoothed(old: float | None, rate: float) -> float:
    return rate if old is None else old + RATE_SMOOTHING * (rate - old)
