"""What a study says of itself between two calls, and the tokens it has spent.

A study yields calls (`calls.py`) and, after each, a `Quantum` that reports it; whoever runs the
study may do anything else in between. Limit: counts and reports, runs no model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from imprint.adapters.calls import Call, Calls, Work

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


Study = Generator[Call[Any] | Quantum, Any, R]
"""A course of work that yields calls and is sent their results, and yields reports."""
Quanta = Iterator[Quantum]


@dataclass(slots=True, kw_only=True)
class Usage:
    """Tokens spent so far, by kind of work."""

    tokens_forward: int = 0
    tokens_backward: int = 0
    rollout_tokens: int = 0

    def run(self, calls: Calls[R], step: int, steps: int) -> Study[R]:
        """Pass calls on, count and report each when it is done, return the work's result."""
        result: Any = None
        while True:
            try:
                call = calls.send(result)
            except StopIteration as stop:
                value: R = stop.value
                return value
            result = yield call
            work = call.work
            self.count(work)
            yield Quantum(phase=work.phase, num_tokens=work.num_tokens, step=step, steps=steps)

    def count(self, work: Work) -> None:
        """Add what a call has cost."""
        self.tokens_forward += work.forward_tokens
        self.tokens_backward += work.backward_tokens
        self.rollout_tokens += work.rollout_tokens

    def to_dict(self) -> dict[str, int]:
        """As it stands in a job's `usage`."""
        return {
            "tokens_forward": self.tokens_forward,
            "tokens_backward": self.tokens_backward,
            "rollout_tokens": self.rollout_tokens,
        }


def quanta_alone(study: Study[R]) -> Generator[Quantum, None, R]:
    """Run a study by itself: its calls alone, one after another; yields its reports."""
    result: Any = None
    while True:
        try:
            item = study.send(result)
        except StopIteration as stop:
            value: R = stop.value
            return value
        if isinstance(item, Quantum):
            result = None
            yield item
        else:
            result = item.alone()
