"""What the scheduler schedules: jobs made of quanta, and requests made of sequences.

Numbers and ids only: no tensors, no text, no HTTP. The engine hangs its own objects on the ids.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from imprint.server.messages import TokenLogprobs
from imprint.server.slots import SlotHandle


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """Work that runs as quanta: an adaptation, or the focus run that a request begins with."""

    id: str
    work_tokens: int
    """Estimate of all tokens that its quanta will process."""
    num_bytes: int
    """Estimate of its memory while it runs."""
    focus: bool = False
    """Part of an answer: runs before adaptations, goes on during a drain."""
    priority: int = 0
    arrived: float
    deadline: float | None = None
    running: bool = False
    started: bool = False
    """Whether a quantum of it has been scheduled."""
    served_tokens: int = 0
    virtual_tokens: float = 0.0
    """Served tokens over the weight of its priority: the least served job runs next."""

    @property
    def weight(self) -> float:
        return float(2.0 ** min(4, max(-4, self.priority)))

    @property
    def remaining_tokens(self) -> int:
        return max(self.work_tokens - self.served_tokens, 0)


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One prompt on its way: waiting for prefill, then decoding one token a step."""

    request_id: str
    sequence_id: str
    prompt: Seq[int]
    seed: int = 0
    max_tokens: int
    slot: SlotHandle | None = None
    num_prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    """Generated so far; the last one has not been read by the model yet."""
    sampled: TokenLogprobs | None = None
    """Log-probabilities at the token sampled last, where they are asked for."""
    finished: bool = False

    @property
    def num_unread(self) -> int:
        """Prompt tokens still to be prefilled."""
        return len(self.prompt) - self.num_prefilled

    @property
    def decoding(self) -> bool:
        return not self.finished and self.slot is not None and self.num_unread == 0


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Sequences that arrived together, from the same document, and share a deadline."""

    id: str
    sequences: list[Sequence]
    arrived: float
    deadline: float | None = None

    @property
    def num_slots(self) -> int:
        """Slots that it takes at most; they are reserved for it when it is admitted."""
        return len(self.sequences)

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    @property
    def decoding(self) -> bool:
        return any(sequence.decoding for sequence in self.sequences)
