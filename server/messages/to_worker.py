"""API -> worker: work, and what becomes of it. Data only; knows no sockets and no HTTP."""

from typing import Any

import msgspec

from imprint.server.messages.base import Message


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
    stop: list[str] = msgspec.field(default_factory=list)
    focus: dict[str, Any] | None = None
    """`RefineConfig` fields (and `preset`) of the focus run; {} is the default focus."""
    timeout_s: float | None = None
    http_request: str = ""
    """As in `Adapt`."""
    traceparent: str = ""
    """As in `Adapt`."""


class Cancel(Message, frozen=True, kw_only=True):
    """Stop an adaptation or a request within one quantum; an unknown id is ignored. An adaptation
    of which only the adapter's way to the disk is left ends as it does."""

    id: str


class Evict(Message, frozen=True, kw_only=True):
    """Drop an adapter from memory and store, ending what uses it; answered by `Evicted`."""

    adapter_id: str


class Drain(Message, frozen=True, kw_only=True):
    """Finish the running answers, run no further adaptation quanta, exit 0."""


ToWorker = Adapt | Generate | Cancel | Evict | Drain
