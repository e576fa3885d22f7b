"""Random lives of the pool's work table: arrivals, cancels, deadlines, and workers that die.

Whatever happens, work is at one worker at most, within every window, and has exactly one end.
"""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from imprint.server.messages import (
    Adapt,
    AdaptationDone,
    AdaptationFailed,
    AdaptationRequeued,
    AdaptationStarted,
    Generate,
    Prompt,
    Ready,
    RequestFailed,
    SequenceDone,
)
from imprint.server.work_table import MAX_WAITING_DEATHS, Work, WorkTable
from imprint.server.worker_config import PoolConfig, WorkerConfig
from imprint.server.worker_process import WorkerProcess

READY = Ready(
    pid=1, model="m", model_hash="h", num_parameters=1, state_bytes=1, num_slots=4, max_tokens=9,
    device="cpu", dtype="float32",
)  # fmt: skip
ENDS = AdaptationDone | AdaptationFailed | RequestFailed | SequenceDone


class WorkLives(RuleBasedStateMachine):
    """A pool without processes: workers are up or down, and say what the rules let them say."""

    @initialize(num_workers=st.integers(1, 3), window=st.integers(1, 3), attempts=st.integers(1, 3))
    def start(self, num_workers: int, window: int, attempts: int) -> None:
        self.config = PoolConfig(
            worker=WorkerConfig(model="m", store="s"),
            num_workers=num_workers,
            worker_window=window,
            max_attempts=attempts,
        )
        self.workers = [WorkerProcess(f"worker-{i}", self.config) for i in range(num_workers)]
        self.table = WorkTable(self.config, self.workers)
        self.all: list[Work] = []
        self.names = itertools.count()

    # ---- clients -----------------------------------------------------------------------------

    @rule(late=st.booleans())
    def a_document_arrives(self, late: bool) -> None:
        message = Adapt(
            adaptation_id=f"a{next(self.names)}",
            tokens=[1],
            method={"type": "read"},
            timeout_s=0.0 if late else None,
        )
        self.all.append(self.table.add(message, lambda: None))
        self._dispatch()

    @rule(late=st.booleans(), num_prompts=st.integers(1, 3))
    def questions_arrive(self, late: bool, num_prompts: int) -> None:
        prompts = [Prompt(sequence_id=str(i), tokens=[1]) for i in range(num_prompts)]
        id = f"r{next(self.names)}"
        message = Generate(request_id=id, prompts=prompts, timeout_s=0.0 if late else None)
        self.all.append(self.table.add(message, lambda: None))
        self._dispatch()

    @rule(choice=st.integers(0, 1000))
    def a_client_cancels(self, choice: int) -> None:
        if work := self._pick(self.table.all(), choice):
            work.cancelled = True
            if work.worker is None:
                self.table.cancel(work)

    # ---- workers -----------------------------------------------------------------------------

    @rule(choice=st.integers(0, 1000))
    def a_worker_stands(self, choice: int) -> None:
        self.workers[choice % len(self.workers)].heard(READY)
        self._dispatch()

    @rule(choice=st.integers(0, 1000))
    def a_worker_dies(self, choice: int) -> None:
        worker = self.workers[choice % len(self.workers)]
        worker.ready = None
        self.table.orphan(worker, "killed")
        assert not [work for work in self.table.all() if work.worker is worker]
        self._dispatch()

    @rule(choice=st.integers(0, 1000), who=st.integers(0, 2))
    def a_worker_begins(self, choice: int, who: int) -> None:
        """`who` may be a worker that has lost the work: nobody listens to it then."""
        work = self._pick(self._placed(Adapt), choice)
        if work is not None and not work.started:
            assert isinstance(work.message, Adapt)
            begun = AdaptationStarted(adaptation_id=work.id, attempt=work.message.attempt)
            worker = self.workers[who % len(self.workers)]
            assert self.table.route(worker, begun) is None
            assert work.started == (work.worker is worker)

    @rule(choice=st.integers(0, 1000), status=st.sampled_from(["succeeded", "cancelled"]))
    def a_worker_finishes_an_adaptation(self, choice: int, status: str) -> None:
        if work := self._pick(self._placed(Adapt), choice):
            assert work.worker is not None
            done = AdaptationDone(adaptation_id=work.id, status=status)
            assert self.table.route(work.worker, done) is work
            self._dispatch()

    @rule(choice=st.integers(0, 1000))
    def a_worker_finishes_a_request(self, choice: int) -> None:
        if work := self._pick(self._placed(Generate), choice):
            assert isinstance(work.message, Generate)
            assert work.worker is not None
            for prompt in work.message.prompts:
                assert self.table.get(work.id) is work
                done = SequenceDone(
                    request_id=work.id, sequence_id=prompt.sequence_id, finish_reason="stop"
                )
                self.table.route(work.worker, done)

    @rule()
    def time_passes(self) -> None:
        self.table.expire()
        assert not [work for work in self.table.held() if work.deadline is not None]

    # ---- what always holds -------------------------------------------------------------------

    @invariant()
    def everything_is_somewhere_and_ends_once(self) -> None:
        if not hasattr(self, "table"):
            return
        inside = set(map(id, self.table.all()))
        for work in self.all:
            assert work.stream.ended != (id(work) in inside)
            self._check_said(work)
        for worker in self.workers:
            studying = [work for work in self._placed(Adapt) if work.worker is worker]
            assert not studying or worker.ready is not None
            assert len(studying) <= self.config.worker_window
            suspects = [work for work in studying if work.message.attempt > 1]  # type: ignore[union-attr]
            assert not suspects or len(studying) == 1

    def _check_said(self, work: Work) -> None:
        said = list(work.stream._queue._queue)  # type: ignore[attr-defined]
        ends = [message for message in said if isinstance(message, ENDS)]
        if isinstance(work.message, Generate):
            assert len(ends) <= len(work.message.prompts)
            failed = [message for message in ends if isinstance(message, RequestFailed)]
            assert not failed or said[-1:] == failed
            return
        assert len(ends) == work.stream.ended
        assert not ends or said[-1] is ends[0]
        attempts = [m.attempt for m in said if isinstance(m, AdaptationRequeued)]
        assert attempts == list(range(2, len(attempts) + 2))
        assert work.message.attempt == len(attempts) + 1 <= self.config.max_attempts
        assert work.num_deaths < MAX_WAITING_DEATHS + self.config.max_attempts

    def teardown(self) -> None:
        """With workers that live, all that was accepted ends."""
        if not hasattr(self, "table"):
            return
        for worker in self.workers:
            worker.heard(READY)
        for _ in range(len(self.all) + 1):
            self._dispatch()
            self.a_worker_finishes_an_adaptation(0, "succeeded")
            self.a_worker_finishes_a_request(0)
            self.everything_is_somewhere_and_ends_once()
        assert self.table.all() == []
        assert all(work.stream.ended for work in self.all)

    def _dispatch(self) -> None:
        for work in self.table.held():
            if (worker := self.table.choose(work.message)) is not None:
                work.worker, work.started = worker, False

    def _placed(self, kind: type[Adapt] | type[Generate]) -> list[Work]:
        return [w for w in self.table.all() if w.worker is not None and isinstance(w.message, kind)]

    @staticmethod
    def _pick(works: list[Work], choice: int) -> Work | None:
        return works[choice % len(works)] if works else None


TestWorkLives = WorkLives.TestCase
TestWorkLives.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
