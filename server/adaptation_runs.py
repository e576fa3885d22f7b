"""The adaptations of one worker: begun, advanced by quanta, ended in exactly one message.

Knows studies and their calls; knows nothing of decoding or of when a quantum may run. Checkpoints
are left where they are when an adaptation ends: the API process deletes them once it has written
the outcome down, so that a process that dies in between costs nothing.
"""

import logging
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.adapters.calls import Call
from imprint.adapters.course import Course
from imprint.adapters.errors import CorruptAdapterError
from imprint.adapters.files import ProgressFolder
from imprint.adapters.progress import Progress
from imprint.adapters.quantum import Quantum
from imprint.server import studies
from imprint.server.messages import (
    Adapt,
    AdaptationBranches,
    AdaptationDone,
    AdaptationEvent,
    AdaptationFailed,
    AdaptationRead,
    AdaptationResumed,
    AdaptationStarted,
    Observation,
    StepBranches,
)
from imprint.server.plain import plain
from imprint.server.records import IMPORT
from imprint.server.scheduler import TooLargeError
from imprint.server.sequence import Job
from imprint.server.tasks import AdaptationTask, Surroundings, is_out_of_memory

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.5


class AdaptationRuns:
    """Every adaptation that this worker has accepted and not ended yet."""

    def __init__(self, around: Surroundings, progress: ProgressFolder) -> None:
        self._around = around
        self._progress = progress
        self._tasks: dict[str, AdaptationTask] = {}
        self._bases: dict[str, str] = {}
        """By adaptation: the adapter that it reads on from, pinned until it has ended."""

    def __contains__(self, adaptation_id: object) -> bool:
        return adaptation_id in self._tasks

    def add(self, message: Adapt) -> None:
        """Check and queue an adaptation; what cannot run fails at once."""
        around, id = self._around, message.adaptation_id
        if id in self._tasks:
            log.warning("adaptation %s was sent twice; the second one is dropped", id)
            return
        try:
            task = self._task(message, around.segment_tokens)
            around.scheduler.add_job(task.job)
        except studies.MethodError as error:
            self.refuse(id, "invalid_method", str(error))
        except TooLargeError as error:
            self.refuse(id, "document_too_large", f"the adaptation {error}")
        else:
            self._tasks[id] = task

    def _task(self, message: Adapt, segment_tokens: int) -> AdaptationTask:
        around = self._around
        num_tokens = len(message.tokens)
        if num_tokens > around.max_tokens:
            raise TooLargeError(f"has {num_tokens} tokens, at most {around.max_tokens} fit")
        config = studies.study_config(message, segment_tokens)
        job = Job(
            id=message.adaptation_id,
            work_tokens=studies.estimate_work_tokens(num_tokens, config),
            num_bytes=studies.estimate_bytes(around.model, num_tokens, config, segment_tokens),
            priority=message.priority,
            arrived=around.clock(),
            deadline=around.deadline(message.timeout_s),
        )
        return AdaptationTask(
            message=message,
            job=job,
            config=config,
            segment_tokens=segment_tokens,
            course=self._course(message, segment_tokens),
            trace=around.trace(message.traceparent),
        )

    def _course(self, message: Adapt, segment_tokens: int) -> Course[Adapter]:
        around = self._around
        if _is_import(message):
            path = self._progress.imports.path(message.adaptation_id)
            return Course(studies.begin_import(around.model, path))
        config = studies.study_config(message, segment_tokens)
        progress = Progress(
            self._progress, message.adaptation_id, around.model_hash, self._count_checkpoint
        )
        return Course(
            studies.begin_study(
                around.model,
                message,
                config,
                segment_tokens,
                neutral=around.neutral,
                neutral_base=around.neutral_base,
                progress=progress,
                base=partial(self._base, message),
                similarity=around.similarity,
            )
        )

    def _base(self, message: Adapt) -> Adapter | None:
        """The adapter to read on from; where it is gone, the document is read from its start."""
        if not message.base_id:
            return None
        self._give_base_back(message.adaptation_id)  # it has begun once, if it begins again
        try:
            adapter = self._around.cache.acquire(message.base_id)
        except (KeyError, ValueError, CorruptAdapterError):
            log.warning("%s cannot be read on from; the whole document is read", message.base_id)
            return None
        self._bases[message.adaptation_id] = message.base_id
        return adapter if adapter.manifest.get("model_hash") == self._around.model_hash else None

    def _give_base_back(self, adaptation_id: str) -> None:
        base_id = self._bases.pop(adaptation_id, None)
        if base_id is not None:
            self._around.cache.release(base_id)

    def _count_checkpoint(self, outcome: str) -> None:
        self._around.count("adaptation_checkpoints_total", outcome=outcome)

    def call(self, job: Job) -> Call[Any] | None:
        """What a study waits for; None before its beginning."""
        return self._tasks[job.id].course.call

    def advance(self, job: Job, result: Any, began: float) -> None:
        """Hand a study the result of its call, or begin it. At its end the adapter goes to the
        disk, and `end` ends the adaptation."""
        task, around = self._tasks[job.id], self._around
        if task.started_at is None:
            self._start(task, began)
        try:
            if isinstance(result, Exception):
                raise result
            reports = task.course.go_on(result)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(task, error)
            return
        around.wait_for(job, task.course.call)
        now = around.clock()
        for quantum in reports:
            task.step = quantum.step
            if quantum.resumed is not None:
                self._resume(task, quantum, quantum.resumed)
            self._tell_study(task, quantum)
            task.trace.quantum(quantum.phase, quantum.step, began, now, quantum.num_tokens)
            if quantum.event is not None:
                around.emit(
                    AdaptationEvent(adaptation_id=job.id, kind="step", data=plain(quantum.event))
                )
            self._report(task, quantum.phase, quantum.step, quantum.steps, now)
        if task.course.ended:
            assert task.course.result is not None
            self._finish(task, task.course.result)

    def _start(self, task: AdaptationTask, now: float) -> None:
        task.started_at = now
        waited_s = now - task.job.arrived
        task.trace.add("queue", task.job.arrived, now)
        self._around.observe(
            Observation(
                name="request_queue_time_seconds", value=waited_s, labels={"kind": "adaptation"}
            )
        )
        self._around.emit(
            AdaptationStarted(adaptation_id=task.job.id, attempt=task.message.attempt)
        )

    def _resume(self, task: AdaptationTask, quantum: Quantum, events: list[dict[str, Any]]) -> None:
        assert task.config is not None
        num_tokens = len(task.message.tokens)
        task.job.work_tokens -= quantum.step * studies.step_tokens(num_tokens, task.config)
        log.info("adaptation %s goes on after step %d", task.job.id, quantum.step)
        self._around.emit(
            AdaptationResumed(
                adaptation_id=task.job.id,
                step=quantum.step,
                steps=quantum.steps,
                events=[plain(event) for event in events],
            )
        )

    def _tell_study(self, task: AdaptationTask, quantum: Quantum) -> None:
        """Pass on what a reader of the study is shown: entropies, then each step's rollouts."""
        if quantum.entropy_T is not None:
            self._tell_entropy(task, quantum.entropy_T)
        if quantum.branches:
            steps = msgspec.convert(plain({"steps": quantum.branches})["steps"], list[StepBranches])
            self._around.emit(AdaptationBranches(adaptation_id=task.job.id, steps=steps))

    def _tell_entropy(self, task: AdaptationTask, entropy_T: Tensor) -> None:
        if task.told_entropy:
            return
        task.told_entropy = True
        half_T = entropy_T.detach().cpu().to(torch.float16)
        entropies = half_T.numpy().astype("<f2").tobytes()
        self._around.emit(AdaptationRead(adaptation_id=task.job.id, entropies=entropies))

    def _report(self, task: AdaptationTask, phase: str, step: int, steps: int, now: float) -> None:
        fresh = task.reported_phase != (phase, step)
        if now - task.reported_at < PROGRESS_INTERVAL_S and not (fresh and task.reported_at == 0):
            return
        task.reported_phase, task.reported_at = (phase, step), now
        self._emit_progress(task, phase, step, steps)

    def _emit_progress(self, task: AdaptationTask, phase: str, step: int, steps: int) -> None:
        data = {
            "phase": phase, "step": step, "steps": steps, "num_tokens": task.job.served_tokens
        }  # fmt: skip
        self._around.emit(AdaptationEvent(adaptation_id=task.job.id, kind="progress", data=data))

    def _shrink(self, task: AdaptationTask, error: BaseException) -> None:
        """Out of memory: begin again with half the segment, once."""
        phase = task.reported_phase[0] if task.reported_phase else "begin"
        recovered = not task.shrunk and task.segment_tokens >= 32
        self._around.count("oom_total", phase=phase, recovered=str(recovered).lower())
        if not recovered:
            raise error
        log.warning("adaptation %s ran out of memory; halving its segment", task.job.id)
        task.course.close()
        self._progress.restart(task.job.id)
        task.shrunk, task.segment_tokens = True, task.segment_tokens // 2
        task.course = self._course(task.message, task.segment_tokens)
        self._around.wait_for(task.job, None)

    def _finish(self, task: AdaptationTask, adapter: Adapter) -> None:
        """The study is over. Its outcome is told by `end`, once the adapter is on the disk."""
        around, id = self._around, task.job.id
        if not adapter.state.is_finite():
            self.fail(id, "non_finite", "the model's state after this document is not finite")
            return
        adapter.manifest["model_hash"] = around.model_hash
        around.scheduler.remove(id)
        around.cache.put(id, adapter)

    def end(self, adaptation_id: str) -> None:
        """Tell the outcome of an adaptation whose adapter the disk has. Raises OSError where the
        disk has refused it."""
        around, id, task = self._around, adaptation_id, self._tasks[adaptation_id]
        around.cache.confirm(id)
        adapter = task.course.result
        assert adapter is not None, "what is written has been made"
        refused = task.config is not None and not adapter.adapted
        usage = adapter.manifest.get("usage", {})
        if _is_import(task.message):
            refused, usage = adapter.manifest["outcome"] == "rejected", {}
            found = {"accepted": adapter.adapted}
        else:
            self._tell_entropy(task, adapter.entropy_T)
            mean = float(adapter.entropy_T.mean())
            around.observe(Observation(name="adaptation_entropy_nats", value=mean))
            found = adapter.manifest.get("result", {})
        if task.config is not None:
            around.count_verdict("adaptation", adapter.adapted)
        seconds = around.clock() - (task.started_at or task.job.arrived)
        result = {**found, "seconds": seconds, "num_tokens": adapter.tokens_T.numel()}
        self._drop(id)
        steps = task.config.steps if task.config is not None else 0
        self._emit_progress(task, "finished", task.step, steps)
        around.emit(
            AdaptationDone(
                adaptation_id=id,
                status="rejected" if refused else "succeeded",
                result=plain(result),
                usage=plain(usage),
                nbytes=adapter.nbytes,
            )
        )

    def fail(self, adaptation_id: str, code: str, message: str, phase: str = "") -> None:
        """End an adaptation with an error; `phase` is where a deadline struck."""
        self._drop(adaptation_id)
        self.refuse(adaptation_id, code, message, phase)

    def refuse(self, adaptation_id: str, code: str, message: str, phase: str = "") -> None:
        """Say that an adaptation has failed, or was never taken in."""
        self._around.emit(
            AdaptationFailed(adaptation_id=adaptation_id, code=code, message=message, phase=phase)
        )

    def cancel(self, adaptation_id: str) -> None:
        """End an adaptation because its client asked for it. One whose adapter is on its way to the
        disk is over, and ends as it does."""
        if adaptation_id not in self._around.cache.writing:
            self.give_up(adaptation_id)

    def give_up(self, adaptation_id: str) -> None:
        """End an adaptation whose adapter nobody may have any more."""
        self._drop(adaptation_id)
        self._around.emit(AdaptationDone(adaptation_id=adaptation_id, status="cancelled"))

    def forget(self, adaptation_id: str) -> None:
        """Delete the checkpoint of an adaptation that has ended, or of any other id."""
        with suppress(ValueError):  # an id that no file can have
            self._progress.delete(adaptation_id)

    def _drop(self, adaptation_id: str) -> None:
        self._around.scheduler.remove(adaptation_id)
        task = self._tasks.pop(adaptation_id)
        task.course.close()
        task.trace.close()
        self._give_base_back(adaptation_id)


def _is_import(message: Adapt) -> bool:
    return message.method.get("type") == IMPORT
