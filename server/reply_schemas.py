"""Shapes of replies, for the OpenAPI document: `server/replies.py` makes them. Checks nothing.

Every shape forbids other fields; a test compares the answers of a live server with them.
"""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

Item = TypeVar("Item")
Status = Literal["queued", "running", "succeeded", "rejected", "failed", "cancelled", "expired"]


class Reply(BaseModel):
    """Base of every reply's shape."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Error(Reply):
    """What went wrong."""

    message: str
    """For people; it may change."""
    type: Literal["invalid_request_error", "server_error"]
    """Whether the request or the server is at fault."""
    param: str | None
    """The field that is meant, as a path: `method.steps`."""
    code: str | None
    """For programs; it stays."""


class ErrorReply(Reply):
    """The one shape of every error, of any status."""

    error: Error


class Page(Reply, Generic[Item]):
    """A page of a list; the next one comes after `last_id`."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | int | None
    last_id: str | int | None
    has_more: bool


class Deleted(Reply):
    """Nothing holds it any more."""

    id: str
    object: Literal["adaptation", "document"]
    deleted: Literal[True]


class Document(Reply):
    """A stored document, without its text."""

    id: str
    object: Literal["document"]
    title: str | None
    media_type: str
    """Of the file that it was read from."""
    version: int
    sha256: str
    num_tokens: int
    bytes: int
    num_references: int
    """Pages or sections whose places in the text are known."""
    created_at: float
    updated_at: float
    expires_at: float | None
    metadata: dict[str, str]


class Reference(Reply):
    """A page or section of the source, and where it lies in the text, in characters."""

    kind: str
    number: int
    start: int
    end: int


class DocumentContent(Reply):
    """A document's text."""

    object: Literal["document.content"]
    id: str
    version: int
    text: str
    references: list[Reference]


class Progress(Reply):
    """How far a job is; each is null before it is known."""

    phase: str | None
    step: int | None
    steps: int | None
    num_tokens: int | None


class Failure(Reply):
    """Why a job has no adapter."""

    message: str
    code: str
    param: str | None


class Adaptation(Reply):
    """A job that studies a document, and what came of it."""

    id: str
    object: Literal["adaptation"]
    status: Status
    """`succeeded` and `rejected` can be asked; `rejected` answers with the base weights."""
    model: str
    method: dict[str, Any]
    """With every field written out; `{"type": "import"}` where the adapter came as a file."""
    seed: int
    priority: int
    document_id: str | None
    """The stored document that it studies; null where the text came with the request."""
    sha256: str
    """Of the document's text, or, for an import, a fingerprint of the file."""
    num_tokens: int
    bytes: int
    """Of the document's text, or of the imported file."""
    adapter_bytes: int
    attempt: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    estimated_finish: float | None
    expires_at: float | None
    used_at: float | None
    idle_expires_after_s: float | None
    seconds: float | None
    error: Failure | None
    progress: Progress
    usage: dict[str, int | float]
    """Tokens read forward, stepped backward and sampled in rollouts."""
    result: dict[str, Any] | None
    """What the gate measured and decided."""
    metadata: dict[str, str]


class AppendedDocument(Document):
    """The document's new version, and the adaptation that reads on."""

    adaptation: Adaptation


class AdaptationEvent(Reply):
    """Something that happened to a job."""

    object: Literal["adaptation.event"]
    sequence: int
    created_at: float
    kind: str
    """`queued`, `running`, `read`, `step`, `resumed`, `requeued`, or the status at the end."""
    data: dict[str, Any]


class PromptDetails(Reply):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Those of the document, which is not read again as a whole."""


class Usage(Reply):
    """Tokens, in the OpenAI shape."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


Way = Literal["focus", "passages", "document", "base"]


class FocusDraft(Reply):
    """One draft of an answer."""

    confidence: float | None
    """How sure the model is of it: mean log-probability of its tokens, in nats. Null where that is
    no finite number; such a draft is the worst."""
    grounding: int
    """How many of its runs of four tokens the document has and the question has not."""


class FocusOutcome(Reply):
    """How the study for one question went. Probes: nats per token at places near its words."""

    steps: int
    alpha: float | None
    """How far towards what was learnt the delta went; null where the gate kept nothing."""
    probe_before: float | None
    probe_after: float | None
    reward_first: float | None
    """Mean reward of the first step's rollouts; null where there were none."""
    reward_last: float | None
    passage_tokens: int
    """Of passages that were read again before the question."""
    way: Way
    """What the question is answered from: passages after the document, with what was learnt for it;
    the same passages alone; the document without either; the document without its own study."""
    drafts: dict[Way, FocusDraft]
    """By way, what decided; empty where no draft was written."""
    reason: str
    """What the gate said, or the drafts."""


class Answer(Reply):
    """One question's outcome."""

    index: int
    question: str
    answer: str
    adapted: bool
    """Whether adapted weights answered; otherwise the base weights did."""
    finish_reason: str
    usage: Usage
    focus: FocusOutcome | None
    """How the study for this question went; null where there was none."""


class Answers(Reply):
    """The outcomes of all questions."""

    id: str
    object: Literal["answers"]
    created_at: float
    model: str
    adaptation: Adaptation
    answers: list[Answer]
    usage: Usage


class CompletionChoice(Reply):
    """One completion of one prompt."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class Completion(Reply):
    """The OpenAI shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatReply(Reply):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """One reply to a conversation."""

    index: int
    message: ChatReply
    finish_reason: str
    logprobs: dict[str, Any] | None


class ChatCompletion(Reply):
    """The OpenAI shape."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(Reply):
    """A model that can be named in requests, in the OpenAI shape."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """The base model of an adapted one."""
    max_document_tokens: int | None = None
    """Of the base model."""
    num_parameters: int | None = None
    """Of the base model."""
    adapted: bool | None = None
    """Of an adapted model: whether its weights differ from the base model's."""


class Tokenized(Reply):
    """A prompt's tokens, in the shape of vLLM."""

    count: int
    max_model_len: int
    """The longest prompt or document that the server takes, in tokens."""
    tokens: list[int]
    token_strs: list[str] | None
    """The tokens as text, where they were asked for, as in `logprobs`."""


class Detokenized(Reply):
    """The text of tokens, in the shape of vLLM."""

    prompt: str


class Alive(Reply):
    """The state that was asked for holds."""

    status: Literal["live", "ready"]


class WorkerHealth(Reply):
    """One worker process."""

    name: str
    up: bool
    heartbeat_age_s: float
    restarts: dict[str, int]
    """How often it was replaced, by reason."""


class Health(Reply):
    """The whole picture."""

    status: Literal["ready", "not_ready", "draining"]
    version: str
    model: str
    device: str | None
    num_parameters: int | None
    adaptations: int
    """Queued or running."""
    requests: int
    """Answers and completions, waiting or running."""
    workers: list[WorkerHealth]


class Version(Reply):
    """Versions of the server and of what it runs on."""

    version: str
    model: str
    python: str
