"""`Engine.step()`: schedule, run, postprocess. Answers decode first, studies advance by quanta.

Knows the model, the adapters and every job of this worker; knows nothing of sockets, processes or
HTTP. What it has to say goes to `emit` at once, what a batch has generated in one message: a token
never waits for a quantum.

An error ends the jobs of the unit of work it happened in (a message, a batch, a quantum) and
nothing else: it leaves `handle` or `step`, and the caller gives it back to `fail_unit`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from imprint.adapters.batches import batches_for
from imprint.adapters.calls import Work
from imprint.adapters.files import ProgressFolder
from imprint.adapters.gate import neutral_loss
from imprint.adapters.similarity import Similarity
from imprint.adapters.store import AdapterStore
from imprint.models import FastWeightModel, Tokenizer, weights_hash
from imprint.server.adaptation_runs import AdaptationRuns
from imprint.server.adapter_cache import AdapterCache
from imprint.server.adapter_tiers import tiers_of
from imprint.server.answer_runs import AnswerRuns
from imprint.server.budgets import budgets_of, scheduler_config
from imprint.server.decoding import BrokenStepError, Decoder
from imprint.server.engine_report import EngineReport
from imprint.server.logs import log_context
from imprint.server.messages import (
    Adapt,
    Cancel,
    Drain,
    Evict,
    Evicted,
    Generate,
    Observation,
    ToWorker,
    WorkerStats,
)
from imprint.server.scheduler import Expired, Scheduler
from imprint.server.sequence import Job, Sequence
from imprint.server.slot_states import SlotStates
from imprint.server.step_times import QUANTUM, StepTimes
from imprint.server.studies import typical_bytes
from imprint.server.tasks import INTERNAL_ERROR, OUT_OF_MEMORY, Emit, Surroundings, failure
from imprint.server.worker_config import WorkerConfig
from imprint.server.worker_memory import free_bytes, host_bytes

log = logging.getLogger(__name__)

DISK_WAIT_S = 0.02
"""How long a step without work waits for the disk before messages are looked at again."""


Refuse = Callable[[str, str, str], None]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is being worked on: whom an error would end."""

    phase: str
    ids: tuple[str, ...]
    refuse: Refuse | None = None
    """How to answer for work that has not been taken in yet."""


class Engine:
    """One model, its slots, and everything that runs on them."""

    def __init__(
        self,
        model: FastWeightModel,
        tokenizer: Tokenizer,
        config: WorkerConfig,
        emit: Emit,
        *,
        model_hash: str,
        neutral: list[int] | None = None,
        similarity: Similarity | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._emit = emit
        self._clock = clock
        self._unit: Unit | None = None
        self._times = StepTimes()
        self._report = EngineReport(emit, self._times, model.device)
        self.slots = SlotStates(model, config.num_slots)
        budgets = budgets_of(
            config,
            free_bytes=free_bytes(model.device),
            host_bytes=host_bytes(),
            job_bytes=typical_bytes(model, config.segment_tokens),
        )
        self.scheduler = Scheduler(scheduler_config(config, budgets))
        tiers = tiers_of(
            model.device,
            device_bytes=budgets.adapter_device_bytes,
            host_bytes=budgets.adapter_host_bytes,
            idle_states=config.idle_states,
        )
        self.cache = AdapterCache(AdapterStore(config.store), tiers, self._report.observe, clock)
        around = Surroundings(
            model=model,
            model_hash=model_hash,
            tokenizer=tokenizer,
            neutral=neutral,
            neutral_base=neutral_loss(model, neutral, None) if neutral else None,
            segment_tokens=config.segment_tokens,
            max_tokens=config.max_tokens,
            scheduler=self.scheduler,
            cache=self.cache,
            batches=batches_for(model),
            emit=emit,
            observe=self._report.observe,
            similarity=similarity,
            clock=clock,
        )
        self._around = around
        self._decoder = Decoder(model, self.slots, self._times)
        self._adaptations = AdaptationRuns(around, ProgressFolder(config.store))
        self._answers = AnswerRuns(around, self.slots)

    # ---- intake ----------------------------------------------------------------------------

    def handle(self, message: ToWorker) -> None:
        """Take a message in; work begins with the next `step`."""
        with self._times.whole():
            self._handle(message)

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Adapt(adaptation_id=id):
                _log_arrival("adaptation", id, message.http_request)
                with self._in_unit("intake", [id], self._adaptations.refuse):
                    self._adaptations.add(message)
            case Generate(request_id=id) if self.scheduler.draining:
                self._answers.refuse(id, "draining", "the server is stopping")
            case Generate(request_id=id):
                _log_arrival("request", id, message.http_request)
                with self._in_unit("intake", [id], self._answers.refuse):
                    self._answers.add(message)
            case Cancel(id=id):
                if id in self._adaptations:
                    self._adaptations.cancel(id)
                elif id in self._answers:
                    self._answers.cancel(id)
            case Evict(adapter_id=adapter_id):
                with self._in_unit("evict", [adapter_id]):
                    self._evict(adapter_id)
            case Drain():
                self.scheduler.draining = True

    def _evict(self, adapter_id: str) -> None:
        if adapter_id in self._adaptations:
            self._adaptations.give_up(adapter_id)
        for request_id in self._answers.using(adapter_id):
            self._answers.fail(request_id, "adapter_not_found", "the adapter was deleted")
        self._decoder.forget()
        self.cache.evict(adapter_id)
        self._adaptations.forget(adapter_id)
        self._emit(Evicted(adapter_id=adapter_id))

    def abort_answers(self, code: str, text: str) -> None:
        """End every request that is not finished."""
        for request_id in self._answers.ids():
            self._answers.fail(request_id, code, text)

    @property
    def draining(self) -> bool:
        """Whether no further adaptation quantum runs and no request is taken in."""
        return self.scheduler.draining

    @property
    def drained(self) -> bool:
        """Whether a drain was asked for, every answer is finished, and the disk has every adapter
        that is made."""
        return self.scheduler.draining and not (self.scheduler.answering or self.cache.writing)

    def weights_are_kept(self) -> bool:
        """Whether the base weights are, bit for bit, those that were loaded. Reads all of them."""
        return weights_hash(self._around.model) == self._around.model_hash

    # ---- the step --------------------------------------------------------------------------

    def step(self) -> bool:
        """One round of work. Returns whether there was any."""
        with self._times.whole():
            return self._step()

    def _step(self) -> bool:
        began = self._clock()
        plan = self.scheduler.schedule(began)
        for expired in plan.expired:
            self._expire(expired)
        for request in plan.begin:
            with self._in_unit("begin", [request.id]):
                self._answers.begin(request)
        loaded = self._answers.loaded()
        for id in loaded:
            with self._in_unit("begin", [id]):
                self._answers.go_on(id)
        written = self.cache.written()
        for id in written:
            with self._in_unit("store", [id]):
                self._adaptations.end(id)
        if not plan.decode and not plan.prefill:
            self._decoder.forget()
        if plan.decode:
            self._forward("decode", [(sequence, 0) for sequence in plan.decode])
        if plan.prefill:
            self._forward("prefill", plan.prefill)
        if plan.quantum:
            with self._times.part(QUANTUM):
                self._quantum(plan.quantum)
        computed = bool(plan.decode or plan.prefill or plan.quantum)
        worked = computed or bool(plan.begin or loaded or written)
        waiting = self._answers.loading or bool(self.cache.writing)
        if worked:
            self._report.step(self._clock() - began, len(plan.decode))
        elif waiting:
            with self._times.part("disk"):
                self.cache.wait(DISK_WAIT_S)
        return worked or bool(plan.expired) or waiting

    def _forward(self, phase: str, parts: Seq[tuple[Sequence, int]]) -> None:
        """One batch; if it raises and has several rows, each of them alone.

        A step in place that breaks off has no rows left to try: they are read again.
        """
        with self._in_unit(phase, [sequence.request_id for sequence, _ in parts]):
            rows = [self._answers.row(sequence, num_tokens) for sequence, num_tokens in parts]
            try:
                tokens = self._decoder.run(rows, reading=phase == "prefill")
            except BrokenStepError as error:
                if not all(self._answers.read_again(sequence) for sequence, _ in parts):
                    raise
                log.warning("%d slots were lost (%s); reading again", len(parts), error.__cause__)
                self._around.count("broken_steps_total")
                return
            except (RuntimeError, MemoryError) as error:
                if len(parts) == 1:
                    raise
                log.warning("a batch of %d rows failed (%s); trying each alone", len(parts), error)
                tokens = None
            if tokens is not None:
                self._take(parts, tokens)
                return
        for part in parts:
            if not part[0].finished:
                self._forward(phase, [part])

    def _take(self, parts: Seq[tuple[Sequence, int]], tokens: Seq[int | None]) -> None:
        try:
            for (sequence, num_tokens), token in zip(parts, tokens, strict=True):
                self._answers.take(sequence, token, num_tokens)
        finally:
            self._answers.tell()

    def _quantum(self, jobs: Seq[Job]) -> None:
        """One quantum of one job, or of several in one batch; then each goes on by itself.

        Those whose part of a batch failed come last: an error leaves the step, and ends one job.
        """
        runs = self._answers if jobs[0].focus else self._adaptations
        phase = "focus" if jobs[0].focus else "quantum"
        began = self._clock()
        calls = [call for job in jobs if (call := runs.call(job)) is not None]
        results: list[Any] = [None] * len(jobs)  # a study that begins is handed nothing
        work = calls[0].work if calls else Work("begin")
        if calls:
            with self._in_unit(phase, [job.id for job in jobs]):
                results = self._around.batches.run(calls)
        now, stage = self._clock(), jobs[0].stage
        self.scheduler.charge(jobs, work.num_tokens, now - began, now, stage=stage)
        pairs = sorted(zip(jobs, results, strict=True), key=lambda pair: _failed(pair[1]))
        try:
            for job, result in pairs:
                with self._in_unit(phase, [job.id]):
                    runs.advance(job, result, began)
        finally:
            self._measure_quantum(work.phase, jobs, began)

    def _measure_quantum(self, phase: str, jobs: Seq[Job], began: float) -> None:
        now = self._clock()
        self.scheduler.rest_after(now - began, now)
        labels = {"phase": f"focus_{phase}" if jobs[0].focus else phase}
        observe = self._report.observe
        observe(Observation(name="quantum_duration_seconds", value=now - began, labels=labels))
        observe(Observation(name="quantum_batch_size", value=len(jobs)))

    @contextmanager
    def _in_unit(self, phase: str, ids: Seq[str], refuse: Refuse | None = None) -> Iterator[None]:
        # left set when an error passes through: fail_unit reads it
        self._unit = Unit(phase, tuple(dict.fromkeys(ids)), refuse)
        with log_context(job_ids=list(self._unit.ids)):
            yield
        self._unit = None

    def fail_unit(self, error: Exception) -> None:
        """End the jobs of the unit that raised `error`. Raises it again if it came from outside
        one."""
        unit, self._unit = self._unit, None
        if unit is None:
            raise error
        code, text = failure(error)
        ids = {"job_ids": list(unit.ids)}
        if code == INTERNAL_ERROR:
            line = "%s of %s failed"
            log.error(line, unit.phase, ", ".join(unit.ids), exc_info=error, extra=ids)
            self._around.count("engine_errors_total", phase=unit.phase)
        else:
            log.warning("%s of %s ended: %s", unit.phase, ", ".join(unit.ids), code, extra=ids)
        if code == OUT_OF_MEMORY and unit.phase != "quantum":  # adaptations count their own
            self._around.count("oom_total", phase=unit.phase, recovered="false")
        for id in unit.ids:
            known = self._fail(id, code, text)
            if not known and unit.refuse is not None:
                unit.refuse(id, code, text)

    def _fail(self, id: str, code: str, text: str, phase: str = "") -> bool:
        """End a job or request; False if there is none of this id."""
        if id in self._adaptations:
            self._adaptations.fail(id, code, text, phase)
        elif id in self._answers:
            self._answers.fail(id, code, text, phase)
        else:
            return False
        return True

    def _expire(self, expired: Expired) -> None:
        text = f"timeout_s has passed (in {expired.phase})"
        self._fail(expired.id, "deadline_exceeded", text, expired.phase)

    # ---- what the API process hears about it --------------------------------------------------

    def flush_observations(self) -> None:
        """Send what has been measured since the last time."""
        self._report.flush()

    def stats(self) -> WorkerStats:
        """The gauges of this moment."""
        return self._report.stats(self.scheduler, self.slots, self.cache)


def _log_arrival(kind: str, id: str, http_request: str) -> None:
    """The line that joins a job's id, which later lines have, with the HTTP request's."""
    log.info("%s %s has arrived", kind, id, extra={"job_ids": [id], "request_id": http_request})


def _failed(result: object) -> bool:
    return isinstance(result, Exception)
