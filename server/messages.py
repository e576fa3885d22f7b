"""What the API process and its workers say to each other: msgspec structs, one tag each, behind
one version byte.

Knows no sockets, no torch and no HTTP. A frame is `PROTOCOL_VERSION` followed by msgpack; a frame
of another version or shape raises `ProtocolError`, so that two builds never half-understand each
other.

API -> worker: `Adapt`, `Generate`, `Cancel`, `Evict`, `Drain`. Worker -> API: everything else.
After a worker's death the pool itself says `AdaptationRequeued`, or `AdaptationFailed` and
`RequestFailed` with code `worker_died`.
"""

from typing import Any, TypeVar

import msgspec

PROTOCOL_VERSION = 1

T = TypeVar("T")


class ProtocolError(ValueError):
    """A frame that this build cannot read: wrong version, unknown tag or wrong field."""


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base of every message; the class name is the tag."""


# ---- API -> worker ---------------------------------------------------------------------------


class Adapt(Message, frozen=True, kw_only=True):
    """Study one document. The adapter is kept under `adaptation_id`."""

    adaptation_id: str
    tokens: list[int]
    method: dict[str, Any]
    """`{"type": "refine" | "read" | "import", ...}`; the others: `RefineConfig` fields, preset."""
    base_id: str = ""
    """An adapter of the document's beginning, to read on from; empty where there is none."""
    seed: int = 0
    priority: int = 0
    """Each step up doubles the share of tokens; -4 to 4, clamped."""
    timeout_s: float | None = None
    """From the worker's receipt, waiting included; None waits for ever."""
    attempt: int = 1
    """1 for the first try; the pool raises it after a worker's death."""
    http_request: str = ""
    """`X-Request-Id` of the HTTP request that it came with, for the log."""
    traceparent: str = ""
    """Span that it is a part of (W3C Trace Context); empty where nothing is traced."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate: its prompt (question template included) and its random stream."""

    sequence_id: str
    tokens: list[int]
    seed: int = 0


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in nats at one generated token, before temperature and penalties."""

    logprob: float
    """Of the token that was sampled."""
    top: list[tuple[int, float]] = []
    """The likeliest tokens with theirs, best first."""


class Generate(Message, frozen=True, kw_only=True):
    """Generate one sequence per prompt, all from the same adapter (None: the base model, no
    document).

    With `focus`, one focus run for all prompts comes first; each prompt then decodes with its own
    delta.
    """

    request_id: str
    prompts: list[Prompt]
    adapter_id: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    """Report each token's log-probability, and those of so many likeliest ones; None: nothing."""
    stop: list[str] = []
    focus: dict[str, Any] | None = None
    """`RefineConfig` fields (and `preset`) of the focus run; {} is the default focus."""
    timeout_s: float | None = None
    http_request: str = ""
    """As in `Adapt`."""
    traceparent: str = ""
    """As in `Adapt`."""


class Cancel(Message, frozen=True, kw_only=True):
    """Stop an adaptation or a request within one quantum; an unknown id is ignored."""

    id: str


class Evict(Message, frozen=True, kw_only=True):
    """Drop an adapter from memory and store, ending what uses it; answered by `Evicted`."""

    adapter_id: str


class Drain(Message, frozen=True, kw_only=True):
    """Finish the running answers, run no further adaptation quanta, exit 0."""


# ---- worker -> API: adaptations --------------------------------------------------------------


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
    result: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    nbytes: int = 0


class AdaptationFailed(Message, frozen=True, kw_only=True):
    """`code`: document_too_short, document_too_large, deadline_exceeded, out_of_memory,
    non_finite, queue_full, invalid_method, worker_died, store_failed, internal_error, or another
    code of `AdaptationError`."""

    adaptation_id: str
    code: str
    message: str


class AdaptationRequeued(Message, frozen=True, kw_only=True):
    """From the pool: the worker died under this adaptation, which is taken up again as
    `attempt`."""

    adaptation_id: str
    attempt: int
    reason: str


class Evicted(Message, frozen=True, kw_only=True):
    """Neither the worker's memory nor the store holds this adapter any more."""

    adapter_id: str


# ---- worker -> API: requests -----------------------------------------------------------------


class FocusProgress(Message, frozen=True, kw_only=True):
    """One quantum of the request's focus run is done."""

    request_id: str
    step: int
    steps: int
    data: dict[str, Any] = {}


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
    usage: dict[str, int] = {}
    """`prompt_tokens` (without the document), `completion_tokens`, `document_tokens`."""
    adapted: bool = False
    """Whether a delta (of the adapter or of the focus run) was in use."""
    focus: dict[str, Any] | None = None
    """The prompt's `FocusResult` as a dict."""


class RequestFailed(Message, frozen=True, kw_only=True):
    """The whole request ends.

    `code`: queue_full, draining, worker_died (these three: 503, try again), adapter_not_found,
    adapter_corrupt, deadline_exceeded, cancelled, context_length_exceeded, invalid_method,
    invalid_request, out_of_memory, non_finite, internal_error.
    """

    request_id: str
    code: str
    message: str


# ---- worker -> API: the worker itself --------------------------------------------------------


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
    """Adapters per tier: "host", "disk"."""
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


ToWorker = Adapt | Generate | Cancel | Evict | Drain
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
FromWorker = AdaptationMessage | RequestMessage | Evicted | Ready | Heartbeat | Observations | Spans

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Message) -> bytes:
    """One frame."""
    return bytes([PROTOCOL_VERSION]) + _encoder.encode(message)


def decode_to_worker(frame: bytes) -> ToWorker:
    """The message of a frame that the API sent; raises `ProtocolError`."""
    return _decode(_to_worker, frame)


def decode_from_worker(frame: bytes) -> FromWorker:
    """The message of a frame that a worker sent; raises `ProtocolError`."""
    return _decode(_from_worker, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    if not frame or frame[0] != PROTOCOL_VERSION:
        found = frame[0] if frame else "an empty frame"
        raise ProtocolError(f"expected protocol version {PROTOCOL_VERSION}, got {found}")
    try:
        return decoder.decode(memoryview(frame)[1:])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"unreadable message: {error}") from error
