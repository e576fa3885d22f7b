"""Worker -> API: what became of the work, and how the worker is. Data only.

After a worker's death the pool itself says `AdaptationRequeued`, or `AdaptationFailed` and
`RequestFailed` with code `worker_died`.
"""

from typing import Any

import msgspec

from imprint.server.messages.base import Message

# ---- adaptations ---------------------------------------------------------------------------------


class AdaptationStarted(Message, frozen=True, kw_only=True):
    """The first quantum is about to run."""

    adaptation_id: str
    attempt: int


class AdaptationResumed(Message, frozen=True, kw_only=True):
    """After `AdaptationStarted`: it goes on from the checkpoint of an earlier process, written
    after `step` steps (0: the document has been read)."""

    adaptation_id: str
    step: int
    steps: int
    events: list[dict[str, Any]]
    """The numbers of each of these steps: some of them may have been lost on their way."""


class AdaptationEvent(Message, frozen=True, kw_only=True):
    """`kind` "progress": {phase, step, steps, num_tokens}, at most two a second; `kind` "step":
    the numbers of one optimisation step. Numbers and short words only, never text of a document."""

    adaptation_id: str
    kind: str
    data: dict[str, Any]


class AdaptationRead(Message, frozen=True, kw_only=True):
    """The document has been read. Said once a process, and before any step is."""

    adaptation_id: str
    entropies: bytes
    """A little-endian float16 a token: entropy in nats of what follows it."""


class StepBranches(msgspec.Struct, frozen=True, kw_only=True):
    """What one step tried, as far as it is kept: see `imprint.adapters.branch_record`."""

    step: int
    num_positions: int
    positions: list[int]
    rollouts: list[list[list[int]]]
    rewards: list[list[float | None]]


class AdaptationBranches(Message, frozen=True, kw_only=True):
    """Rollouts of one step, before its event; or, after `AdaptationResumed`, of all steps so far.

    These token ids are close to the document's text: they are kept where the text is kept, and
    never logged, counted or made an event.
    """

    adaptation_id: str
    steps: list[StepBranches]


class AdaptationDone(Message, frozen=True, kw_only=True):
    """`status` is "succeeded", "rejected" (studied, and the gate refused) or "cancelled"."""

    adaptation_id: str
    status: str
    result: dict[str, Any] = msgspec.field(default_factory=dict)
    usage: dict[str, Any] = msgspec.field(default_factory=dict)
    nbytes: int = 0


class AdaptationFailed(Message, frozen=True, kw_only=True):
    """`code`: document_too_large, deadline_exceeded, out_of_memory, non_finite, queue_full,
    invalid_method, worker_died, store_failed, internal_error, or another code of
    `AdaptationError`."""

    adaptation_id: str
    code: str
    message: str
    phase: str = ""
    """Of a deadline_exceeded: where the deadline struck, queue or quantum."""


class AdaptationRequeued(Message, frozen=True, kw_only=True):
    """From the pool: the worker died under this adaptation, which is taken up again as
    `attempt`."""

    adaptation_id: str
    attempt: int
    reason: str


class Evicted(Message, frozen=True, kw_only=True):
    """Neither the worker's memory nor the store holds this adapter any more."""

    adapter_id: str


# ---- requests ------------------------------------------------------------------------------------


class FocusProgress(Message, frozen=True, kw_only=True):
    """One quantum of the request's focus run is done."""

    request_id: str
    step: int
    steps: int
    data: dict[str, Any] = msgspec.field(default_factory=dict)


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in nats at one generated token, before temperature and penalties."""

    logprob: float
    """Of the token that was sampled."""
    top: list[tuple[int, float]] = []
    """The likeliest tokens with theirs, best first."""


class TokenDelta(Message, frozen=True, kw_only=True):
    """One generated token. `text` may be empty: a character or a possible stop string is not
    complete yet."""

    request_id: str
    sequence_id: str
    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None = None


class SequenceDone(Message, frozen=True, kw_only=True):
    """A sequence's end. `text` is what was held back and belongs to the answer; `finish_reason`:
    stop, length."""

    request_id: str
    sequence_id: str
    finish_reason: str
    text: str = ""
    usage: dict[str, int] = msgspec.field(default_factory=dict)
    """`prompt_tokens` (without the document), `completion_tokens`, `document_tokens`."""
    adapted: bool = False
    """Whether a delta (of the adapter or of the focus run) was in use."""
    focus: dict[str, Any] | None = None
    """The prompt's `FocusResult` as a dict."""


class Generated(Message, frozen=True, kw_only=True):
    """All that one batch has generated, in order: a token delays no other, and a step of many
    sequences is one frame."""

    values: list[TokenDelta | SequenceDone]


class RequestFailed(Message, frozen=True, kw_only=True):
    """The whole request ends.

    `code`: queue_full, draining, worker_died (these three: 503, try again), adapter_not_found,
    adapter_corrupt, deadline_exceeded, cancelled, context_length_exceeded, invalid_method,
    invalid_request, out_of_memory, non_finite, internal_error.
    """

    request_id: str
    code: str
    message: str
    phase: str = ""
    """Of a deadline_exceeded: where the deadline struck, queue, quantum (focus) or decode."""


# ---- the worker itself ---------------------------------------------------------------------------


class Ready(Message, frozen=True, kw_only=True):
    """The model is loaded; sent once, first."""

    pid: int
    model: str
    model_hash: str
    num_parameters: int
    state_bytes: int
    """Bytes of one recurrent state (one slot)."""
    num_slots: int
    max_tokens: int
    """Longest document or prompt that is accepted."""
    device: str
    dtype: str


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of one worker, as of its last heartbeat."""

    adaptations_waiting: int = 0
    adaptations_running: int = 0
    adaptation_finish_s: dict[str, float] = {}
    """Estimated seconds until each adaptation of this worker is done, at the rate of late."""
    backlog_s: float = 0.0
    """Estimated seconds until all of them are done."""
    adaptation_bytes: int = 0
    """Memory that its adaptations need, waiting ones included, by estimate."""
    adaptation_capacity_bytes: int = 0
    requests_waiting: int = 0
    """Requests of which no sequence decodes yet (queued, in focus or in prefill)."""
    requests_running: int = 0
    slots_used: int = 0
    slots_free: int = 0
    adapters: dict[str, int] = {}
    """Adapters per tier: "device", "host", "disk"; a CPU has no "device" while states are exact."""
    adapter_bytes: dict[str, int] = {}
    adapter_capacity_bytes: dict[str, int] = {}
    engine_steps: int = 0
    engine_last_step_duration_s: float = 0.0
    longest_quantum_s: float = 0.0
    """Of the last five to ten seconds."""
    engine_last_step_time: float = 0.0
    """Unix time of the end of the last step that did work; 0 before the first."""
    batch_size: int = 0
    """Sequences in the last decode batch."""
    memory_bytes: int = 0
    """Resident memory of the process."""
    device_bytes: dict[str, int] = {}
    """Memory of its GPU by kind: allocated, reserved, free, total; empty on a CPU."""


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent between units of work, at most once an interval: it is late by at most the longest
    quantum."""

    time: float
    stats: WorkerStats


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One value for one metric: `name` without the prefix; counters add it, histograms observe
    it."""

    name: str
    value: float
    labels: dict[str, str] = {}


class Observations(Message, frozen=True, kw_only=True):
    """A batch of observations, sent at the latest with the next heartbeat."""

    values: list[Observation]


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of work that a worker has measured, for the trace it belongs to."""

    traceparent: str
    """Its parent."""
    name: str
    began: float
    """Unix time."""
    ended: float
    attributes: dict[str, str | int | float] = {}


class Spans(Message, frozen=True, kw_only=True):
    """Sent only for work that came with a `traceparent`."""

    values: list[SpanRecord]


AdaptationMessage = (
    AdaptationStarted
    | AdaptationResumed
    | AdaptationEvent
    | AdaptationRead
    | AdaptationBranches
    | AdaptationDone
    | AdaptationFailed
    | AdaptationRequeued
)
RequestMessage = FocusProgress | TokenDelta | SequenceDone | RequestFailed
WorkMessage = AdaptationMessage | RequestMessage
FromWorker = (
    AdaptationMessage
    | RequestMessage
    | Generated
    | Evicted
    | Ready
    | Heartbeat
    | Observations
    | Spans
)
