"""One unit of work that a study has just done; between two the caller may do anything else."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from imprint.adapters.reading import Work

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantum:
    """`event` is set on the last quantum of an optimisation step: the numbers of that step."""

    phase: str
    """read, rollout, backward, probe, ..."""
    num_tokens: int
    """Tokens this quantum read, forward or backward."""
    step: int = 0
    steps: int = 0
    event: dict[str, Any] | None = None
    resumed: list[dict[str, Any]] | None = None
    """Set on the first quantum of a study that goes on after `step` steps: their events."""
    entropy_T: Tensor | None = None
    """Set once, when the document has been read: entropy in nats after each token, on the host."""
    branches: list[dict[str, Any]] | None = None
    """What the step of `event`, or the steps of `resumed`, tried: see `branch_record.py`."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """Tokens spent so far, by kind of work."""

    tokens_forward: int = 0
    tokens_backward: int = 0
    rollout_tokens: int = 0

    def run(
        self, work: Generator[Work, None, R], step: int, steps: int
    ) -> Generator[Quantum, None, R]:
        """Pass the work's pieces on as quanta, count their tokens, return the work's result."""
        while True:
            try:
                piece = next(work)
            except StopIteration as stop:
                result: R = stop.value
                return result
            self.tokens_forward += piece.forward_tokens
            self.tokens_backward += piece.backward_tokens
            self.rollout_tokens += piece.rollout_tokens
            tokens = piece.forward_tokens + piece.backward_tokens + piece.rollout_tokens
            yield Quantum(phase=piece.phase, num_tokens=tokens, step=step, steps=steps)

    def to_dict(self) -> dict[str, int]:
        """As it stands in a job's `usage`."""
        return {
            "tokens_forward": self.tokens_forward,
            "tokens_backward": self.tokens_backward,
            "rollout_tokens": self.rollout_tokens,
        }


Quanta = Iterator[Quantum]
