"""Random lives of a scheduler: arrivals, lengths, cancels, deadlines, errors, in any order.

A machine plays the engine and keeps its own books. After every step they must agree with the
scheduler's promises: budgets are kept, nobody overtakes, every wait has a bound, all work ends.
"""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from imprint.server.scheduler import (
    ADAPTATION_EVERY,
    LEAD_TOKENS,
    Plan,
    QueueFullError,
    Scheduler,
    SchedulerConfig,
    TooLargeError,
)
from imprint.server.sequence import Job, Request, Sequence
from imprint.server.slots import SlotHandle

STEP_S = 0.01
QUANTUM_TOKENS = (16, 64)
"""Fewest and most tokens of a quantum here."""


def chosen_jobs(plan: Plan) -> list[Job]:
    """The jobs whose quanta a step runs, as one batch."""
    return plan.quantum


class SchedulerLives(RuleBasedStateMachine):
    """Everything that may happen to a scheduler between two steps, and the steps."""

    @initialize(
        num_slots=st.integers(1, 6),
        step_tokens=st.integers(4, 48),
        share=st.sampled_from([0.1, 0.5, 1.0]),
        max_running=st.integers(1, 4),
        max_batched=st.integers(1, 4),
        num_bytes=st.integers(50, 200),
        max_waiting=st.integers(1, 5),
    )
    def start(
        self,
        num_slots: int,
        step_tokens: int,
        share: float,
        max_running: int,
        max_batched: int,
        num_bytes: int,
        max_waiting: int,
    ) -> None:
        self.config = SchedulerConfig(
            num_slots=num_slots,
            step_tokens=step_tokens,
            adaptation_share=share,
            max_running_adaptations=max_running,
            max_batched_adaptations=max_batched,
            adaptation_bytes=num_bytes,
            max_waiting_requests=max_waiting,
        )
        self.scheduler = Scheduler(self.config)
        self.now = 0.0
        self.count = 0
        self.jobs: dict[str, Job] = {}
        self.waiting: deque[Request] = deque()
        self.admitted: dict[str, Request] = {}
        self.focusing: dict[str, Job] = {}
        self.active: set[str] = set()
        self.passed_over: dict[str, Counter[str]] = {}
        """By running job: which others have had how many quanta since its own last one."""
        self.focus_in_a_row = 0
        self.quantum_due_at = 0.0

    def _name(self) -> str:
        self.count += 1
        return f"w{self.count}"

    # ---- arrivals ----------------------------------------------------------------------------

    @rule(
        num_bytes=st.integers(1, 220),
        priority=st.integers(-1, 1),
        work=st.sampled_from([1, 100, 800]),
        patience=st.none() | st.integers(1, 200),
    )
    def a_document_arrives(
        self, num_bytes: int, priority: int, work: int, patience: int | None
    ) -> None:
        job = Job(
            id=self._name(),
            work_tokens=work,
            num_bytes=num_bytes,
            priority=priority,
            arrived=self.now,
            deadline=None if patience is None else self.now + patience * STEP_S,
        )
        fits = num_bytes <= self.config.adaptation_bytes
        try:
            self.scheduler.add_job(job)
        except TooLargeError:
            assert not fits
        else:
            assert fits
            self.jobs[job.id] = job

    @rule(
        lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7),
        max_tokens=st.integers(1, 8),
        patience=st.none() | st.integers(1, 100),
    )
    def questions_arrive(self, lengths: list[int], max_tokens: int, patience: int | None) -> None:
        id = self._name()
        request = Request(
            id=id,
            sequences=[
                Sequence(request_id=id, sequence_id=f"{id}.{i}", prompt=[1] * n, max_tokens=m)
                for i, (n, m) in enumerate(zip(lengths, [max_tokens] * len(lengths), strict=True))
            ],
            arrived=self.now,
            deadline=None if patience is None else self.now + patience * STEP_S,
        )
        fits, full = (
            request.num_slots <= self.config.num_slots,
            len(self.waiting) >= self.config.max_waiting_requests,
        )
        try:
            self.scheduler.add_request(request)
        except TooLargeError:
            assert not fits
        except QueueFullError:
            assert fits
            assert full
        else:
            assert fits
            assert not full
            self.waiting.append(request)

    # ---- departures --------------------------------------------------------------------------

    @rule(choice=st.integers(0, 1000))
    def a_client_leaves_or_a_unit_fails(self, choice: int) -> None:
        known = [*self.jobs, *(request.id for request in self.waiting), *self.admitted]
        if known:
            id = known[choice % len(known)]
            self.scheduler.remove(id)
            self._forget(id)

    def _forget(self, id: str) -> None:
        self.jobs.pop(id, None)
        self.admitted.pop(id, None)
        self.focusing.pop(id, None)
        self.passed_over.pop(id, None)
        self.active.discard(id)
        self.waiting = deque(request for request in self.waiting if request.id != id)

    # ---- steps -------------------------------------------------------------------------------

    @rule(focus=st.booleans(), num_tokens=st.integers(*QUANTUM_TOKENS), idle=st.integers(0, 3))
    def the_engine_steps(self, focus: bool, num_tokens: int, idle: int) -> None:
        self.now += (1 + idle) * STEP_S
        plan = self.scheduler.schedule(self.now)
        self._expire(plan)
        self._admit(plan)
        self._answer(plan)
        self._begin(plan, focus)
        self._study(plan, num_tokens)

    def _expire(self, plan: Plan) -> None:
        everything: list[Job | Request] = [*self.jobs.values(), *self.waiting]
        everything += self.admitted.values()
        late = {i.id for i in everything if i.deadline is not None and self.now >= i.deadline}
        assert {expired.id for expired in plan.expired} == late
        assert len(plan.expired) == len(late)
        for id in late:
            self._forget(id)

    def _admit(self, plan: Plan) -> None:
        """First come, first served; whoever waits longest is admitted as soon as it fits."""
        fresh = [request for request in plan.begin if request.id not in self.admitted]
        assert fresh == [self.waiting.popleft() for _ in fresh]
        self.admitted |= {request.id: request for request in fresh}
        used = sum(request.num_slots for request in self.admitted.values())
        assert used <= self.config.num_slots
        if self.waiting:
            assert used + self.waiting[0].num_slots > self.config.num_slots

    def _answer(self, plan: Plan) -> None:
        running = [s for id in self.active for s in self.admitted[id].sequences]
        decoding = {sequence.sequence_id for sequence in running if sequence.decoding}
        assert {sequence.sequence_id for sequence in plan.decode} == decoding
        assert len(plan.decode) == len(decoding)
        unread = [sequence for sequence in running if sequence.num_unread]
        shares = [num_tokens for _, num_tokens in plan.prefill]
        assert sum(shares) <= self.config.step_tokens
        wanted = min(self.config.step_tokens, sum(sequence.num_unread for sequence in unread))
        assert sum(shares) >= min(wanted, len(unread))
        for sequence in plan.decode:
            sequence.tokens.append(1)
            sequence.finished = len(sequence.tokens) >= sequence.max_tokens
        for sequence, num_tokens in plan.prefill:
            assert 1 <= num_tokens <= sequence.num_unread
            sequence.num_prefilled += num_tokens
            if not sequence.num_unread:
                sequence.tokens.append(1)
                sequence.finished = len(sequence.tokens) >= sequence.max_tokens
        for id in [id for id in self.active if self.admitted[id].finished]:
            self.scheduler.remove(id)
            self._forget(id)

    def _begin(self, plan: Plan, focus: bool) -> None:
        for request in plan.begin:
            if request.id not in self.admitted:
                continue
            self.scheduler.begun(request.id)
            if focus:
                job = Job(
                    id=request.id,
                    work_tokens=40,
                    num_bytes=0,
                    focus=True,
                    arrived=request.arrived,
                )
                self.scheduler.add_job(job)
                self.focusing[request.id] = job
            else:
                self._activate(request)

    def _activate(self, request: Request) -> None:
        for number, sequence in enumerate(request.sequences, 1):
            sequence.slot = SlotHandle(number, 0)
        self.scheduler.activate(request.id)
        self.active.add(request.id)

    def _study(self, plan: Plan, num_tokens: int) -> None:
        jobs = chosen_jobs(plan)
        runnable = [job for job in self.jobs.values() if job.running]
        answering = bool(plan.decode or plan.prefill)
        if (runnable or self.focusing) and not plan.begin:
            due = not answering or self.now >= self.quantum_due_at
            assert due == bool(jobs)
        assert len(jobs) <= self.config.max_batched_adaptations
        assert len({job.focus for job in jobs}) <= 1
        assert len(jobs) <= 1 or {job.kind for job in jobs} == {jobs[0].kind} != {None}
        for job in jobs:
            assert job in runnable or job in self.focusing.values()
        self._wait_of_others(jobs, runnable)
        for job in jobs:  # on to another stage, or on in the same one
            job.stage = (job.stage + num_tokens) % 4
            job.kind = job.stage or None
        if jobs:
            duration_s = STEP_S * len(jobs)
            self.scheduler.charge(jobs, num_tokens, duration_s, self.now, stage=jobs[0].stage)
            share = self.config.adaptation_share
            self.quantum_due_at = self.now + duration_s * (1 - share) / share
        for job in jobs:
            if job.served_tokens >= job.work_tokens:
                if job.focus:
                    del self.focusing[job.id]
                    self._activate(self.admitted[job.id])
                else:
                    self.scheduler.remove(job.id)
                    self._forget(job.id)

    def _wait_of_others(self, jobs: list[Job], runnable: list[Job]) -> None:
        """No starvation: how often another document may go first depends on the priorities of
        the two, on how much quanta differ, and on how far a document may run ahead to fall into
        step with others; never on how much work there is."""
        if not jobs:
            return
        if jobs[0].focus:
            self.focus_in_a_row += 1
            assert not runnable or self.focus_in_a_row < ADAPTATION_EVERY
            return
        self.focus_in_a_row = 0
        fewest, most = QUANTUM_TOKENS
        for job in jobs:
            self.passed_over[job.id] = Counter()
        for other in runnable:
            if other not in jobs:
                passed = self.passed_over.setdefault(other.id, Counter())
                for job in jobs:
                    passed[job.id] += 1
                    ahead = job.weight * (most / other.weight + 2 * LEAD_TOKENS)
                    assert passed[job.id] <= 2 + ahead / fewest

    # ---- what always holds -------------------------------------------------------------------

    @invariant()
    def budgets_are_kept(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running = [job for job in self.jobs.values() if job.running]
        assert len(running) <= self.config.max_running_adaptations
        used = sum(job.num_bytes for job in running)
        assert len(running) <= 1 or used <= self.config.adaptation_bytes
        counts = self.scheduler.counts()
        assert counts.adaptations_running == len(running)
        assert counts.adaptations_waiting == len(self.jobs) - len(running)
        assert counts.requests_waiting + counts.requests_running == (
            len(self.waiting) + len(self.admitted)
        )
        assert self.scheduler.answering == bool(self.waiting or self.admitted)

    def teardown(self) -> None:
        """Left alone, all that was accepted ends, in as many steps as its work needs at most."""
        if not hasattr(self, "scheduler"):
            return
        requests = [*self.waiting, *self.admitted.values()]
        tokens = sum(len(s.prompt) + s.max_tokens for r in requests for s in r.sequences)
        work = sum(job.work_tokens for job in self.jobs.values()) + 40 * len(requests)
        quanta = work // QUANTUM_TOKENS[0] + len(self.jobs) + len(requests)
        steps_per_quantum = 1 + int(1 / self.config.adaptation_share)
        for _ in range(tokens + steps_per_quantum * (quanta + 1) + len(requests)):
            if not (self.jobs or self.waiting or self.admitted):
                break
            self.the_engine_steps(focus=False, num_tokens=QUANTUM_TOKENS[0], idle=0)
            self.budgets_are_kept()
        assert not self.jobs
        assert not self.waiting
        assert not self.admitted
        assert self.scheduler.schedule(self.now + 1) == Plan()


TestSchedulerLives = SchedulerLives.TestCase
TestSchedulerLives.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
