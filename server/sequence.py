"""What the scheduler schedules: jobs made of quanta, and requests made of sequences.

Numbers and ids only: no tensors, no text, no HTTP. The engine hangs its own objects on the ids.
"""

from collections.abc import Hashable
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
    kind: Hashable | None = None
    """What its next quantum is; jobs whose kinds are equal can share it. None: it runs alone."""
    stage: int = 0
    """Where in its cycle it is; those at an early stage go first, so that all meet."""
    quantum_tokens: int = 0
    """What its next quantum will process."""
    most_together: int | None = None
    """How many jobs may share its next quantum; None: any number."""

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
    context: Seq[int] = ()
    """Passages of the document that are read before the prompt, where a focus run chose some."""
    seed: int = 0
    max_tokens: int
    slot: SlotHandle | None = None
    num_prefilled: int = 0
    prefill_turn: int = 0
    """The scheduler's step after the one in which it was last read on, or when it was first seen;
    0: it was not seen yet."""
    tokens: list[int] = field(default_factory=list)
    """Generated so far; the last one has not been read by the model yet."""
    sampled: TokenLogprobs | None = None
    """Log-probabilities at the token sampled last, where they are asked for."""
    num_reread: int = 0
    """Generated tokens that are read again after the prompt, because the slot was lost."""
    num_losses: int = 0
    """How often that has happened."""
    finished: bool = False

    @property
    def num_unread(self) -> int:
        """Tokens still to be prefilled: of context and prompt, and of what is read again."""
        return self.num_given + self.num_reread - self.num_prefilled

    @property
    def num_given(self) -> int:
        """Tokens of context and prompt."""
        return len(self.context) + len(self.prompt)

    def piece(self, num_tokens: int) -> list[int]:
        """The next tokens to prefill, at most so many."""
        first = self.num_prefilled
        return [*self.context, *self.prompt, *self.tokens[: self.num_reread]][
            first : first + num_tokens
        ]

    def read_again(self) -> None:
        """Its slot was lost and is at the document's end again: everything since is unread."""
        self.num_prefilled, self.num_reread = 0, len(self.tokens)
        self.num_losses += 1

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
