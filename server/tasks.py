"""What the engine hangs on a scheduled id: the message, its generator, the text so far.

Data and small derivations only; the decisions are in `adaptation_runs.py` and `answer_runs.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.batches import Batches
from imprint.adapters.calls import Call
from imprint.adapters.config import RefineConfig
from imprint.adapters.course import Course
from imprint.adapters.errors import AdaptationError, ConfigError, CorruptAdapterError
from imprint.adapters.focus import Focus, FocusResult
from imprint.adapters.similarity import Similarity
from imprint.models import FastWeightModel, LoraDelta, Tokenizer
from imprint.server.adapter_cache import AdapterCache
from imprint.server.messages import Adapt, FromWorker, Generate, Observation
from imprint.server.scheduler import Scheduler
from imprint.server.sequence import Job, Request, Sequence
from imprint.server.text_stream import TextStream
from imprint.server.work_trace import WorkTrace

Emit = Callable[[FromWorker], None]
OUT_OF_MEMORY = "out_of_memory"
INTERNAL_ERROR = "internal_error"
"""The code of errors that nobody expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the parts of an engine share."""

    model: FastWeightModel
    model_hash: str
    """Adapters are kept with it, and refused where it differs."""
    tokenizer: Tokenizer
    neutral: list[int] | None
    """Tokens of the neutral text that the gate watches."""
    neutral_base: float | None
    """Its loss in nats under the base weights, which never change."""
    segment_tokens: int
    max_tokens: int
    scheduler: Scheduler
    cache: AdapterCache
    batches: Batches
    emit: Emit
    observe: Callable[[Observation], None]
    similarity: Similarity | None = None
    """For the reward `semantic`; None where the user has plugged in no encoder."""
    clock: Callable[[], float] = time.monotonic

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter of the API process."""
        self.observe(Observation(name=name, value=1.0, labels=labels))

    def count_verdict(self, kind: str, accepted: bool) -> None:
        """Count what the gate said of a document's or a question's delta."""
        outcome = "accepted" if accepted else "rejected"
        self.count("gate_verdicts_total", kind=kind, outcome=outcome)

    def trace(self, traceparent: str) -> WorkTrace:
        """Where a job's time is written down."""
        return WorkTrace(traceparent, self.emit, self.clock)

    def wait_for(self, job: Job, call: Call[Any] | None) -> None:
        """Tell the scheduler what a job's next quantum is; None: nobody knows before it runs."""
        most = None if call is None else self.batches.most(call)
        job.kind = None if call is None or most == 1 else call.key
        job.stage = 0 if call is None else call.stage
        job.quantum_tokens = 0 if call is None else call.work.num_tokens
        job.most_together = most

    def deadline(self, timeout_s: float | None) -> float | None:
        """The time at which a job that arrives now is too late."""
        return None if timeout_s is None else self.clock() + timeout_s


@dataclass(slots=True, kw_only=True)
class AdaptationTask:
    """One adaptation of this worker."""

    message: Adapt
    job: Job
    config: RefineConfig | None
    """None where the document is only read."""
    segment_tokens: int
    course: Course[Adapter]
    trace: WorkTrace
    started_at: float | None = None
    step: int = 0
    """The optimisation step of the last quantum; early stopping ends before the last one."""
    shrunk: bool = False
    """Whether it has begun again with half the segment, after it ran out of memory."""
    reported_phase: tuple[str, int] | None = None
    reported_at: float = 0.0
    told_entropy: bool = False
    """Whether `AdaptationRead` has been said."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """One sequence's text, and what it is generated with."""

    sequence: Sequence
    text: TextStream
    memory_share: float = 1.0
    """How much of its strength the document's memory keeps where the sequence begins."""
    delta: LoraDelta | None = None
    adapted: bool = False
    """Whether anything that a study has changed answers."""
    focus: FocusResult | None = None


@dataclass(slots=True, kw_only=True)
class RequestTask:
    """One request of this worker."""

    message: Generate
    request: Request
    config: RefineConfig | None
    """Settings of its focus run, if there is one."""
    answers: dict[str, Answer]
    """By sequence id."""
    trace: WorkTrace
    adapter: Adapter | None = None
    focus: Focus | None = None
    course: Course[None] | None = None
    """Its focus run, once it has begun."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or its cause, says that memory, of host or device, has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def failure(error: Exception) -> tuple[str, str]:
    """The code and the message under which an error ends a job. No internals in the message."""
    if isinstance(error, AdaptationError):
        return error.code, str(error)
    if isinstance(error, ConfigError):
        return "invalid_method", str(error)
    if isinstance(error, CorruptAdapterError):
        return "adapter_corrupt", "the stored adapter is damaged or of another model; adapt again"
    if is_out_of_memory(error):
        return OUT_OF_MEMORY, "the worker ran out of memory; send less at once"
    if isinstance(error, OSError):
        return "store_failed", f"the adapter could not be written or read: {error.strerror}"
    return INTERNAL_ERROR, "the worker failed on this job; its log says why"
