"""What a study asks the model for, and how it is asked: alone, or for several studies in one batch.

A study is a generator that yields a `Call` and is sent its result. A call is a pure function of its
inputs, so it can be run twice, alone, or together with calls of other studies that have the same
key: same kind, same shapes, same settings. Limit: knows no document, job or queue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from imprint.models import FastWeightModel, LoraDelta, RecurrentState

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Work:
    """What a call costs."""

    phase: str
    """read, rollout, backward, probe, gate, select or draft."""
    forward_tokens: int = 0
    backward_tokens: int = 0
    rollout_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """All tokens of it, forward and backward."""
        return self.forward_tokens + self.backward_tokens + self.rollout_tokens


class Call(ABC, Generic[R]):
    """One piece of work whose result is of type R."""

    stage: ClassVar[int] = 0
    """Its place in a study's cycle. Studies that wait at an early one are served first, within
    bounds: so they catch up with the others, and all meet in one batch."""

    @property
    @abstractmethod
    def work(self) -> Work:
        """What it costs."""

    @property
    @abstractmethod
    def key(self) -> Hashable | None:
        """Calls of equal keys can be run together; None: only alone."""

    @abstractmethod
    def together(self, calls: Sequence[Self]) -> list[R]:
        """The results of `calls`, which include this one and have its key, in order.

        Leaves the inputs alone, so that it can be tried again after an error.
        """

    def witness(self, calls: Sequence[Self]) -> list[Any]:
        """What shows best how the results of `calls` are rounded, a value each.

        Results may be too few numbers for that, and a delta or a state that is zero hides what its
        products do. Defaults to the results.
        """
        return self.together(calls)

    def alone(self) -> R:
        """The result of this call."""
        (result,) = self.together([self])
        return result


@dataclass(frozen=True, slots=True, eq=False)
class AloneCall(Call[R]):
    """Work that shares a batch with nobody, such as a pass that keeps its graph."""

    cost: Work
    function: Callable[[], R]

    @property
    def work(self) -> Work:
        return self.cost

    @property
    def key(self) -> None:
        return None

    def together(self, calls: Sequence[Self]) -> list[R]:
        return [call.function() for call in calls]


Calls = Generator[Call[Any], Any, R]
"""A course of work that yields calls, is sent their results, and returns an R."""


def ask(call: Call[R]) -> Calls[R]:
    """Yield one call; `result = yield from ask(call)` keeps the result's type."""
    result: R = yield call
    return result


def run_calls(work: Calls[R], done: Callable[[Work], None] | None = None) -> R:
    """Run each call alone until the work returns; `done` is told the cost of each."""
    result: Any = None
    while True:
        try:
            call = work.send(result)
        except StopIteration as stop:
            value: R = stop.value
            return value
        result = call.alone()
        if done is not None:
            done(call.work)


def stacked_states(states: Sequence[RecurrentState]) -> RecurrentState:
    """The rows of all, in order; a single state is passed on as it is."""
    return states[0] if len(states) == 1 else RecurrentState.stack(states)


def stacked_deltas(deltas: Sequence[LoraDelta | None]) -> LoraDelta | None:
    """All deltas in one; None where there are none."""
    kept = [delta for delta in deltas if delta is not None]
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else LoraDelta.stack(kept)


def telling_delta(delta: LoraDelta | None) -> LoraDelta | None:
    """The same delta, with numbers where B is zero: for `witness`."""
    if delta is None:
        return None
    filled = {name: _filled(b_QOR) for name, b_QOR in delta.b.items()}
    return LoraDelta(dict(delta.a), filled, delta.lengths_B)


def telling_state(state: RecurrentState) -> RecurrentState:
    """The same state, with numbers where a document's start has zeros: for `witness`."""
    return RecurrentState(
        tuple({name: _filled(t) for name, t in layer.items()} for layer in state.layers)
    )


def _filled(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    order = torch.arange(1, tensor.numel() + 1, device=tensor.device).view_as(tensor)
    return torch.where(tensor == 0, 0.1 * order.sin().to(tensor.dtype), tensor)


def model_key(model: FastWeightModel) -> Hashable:
    """What must agree for calls to share a batch: a study may have weights of its own."""
    return id(model)


def delta_key(delta: LoraDelta | None) -> Hashable:
    """What must agree for deltas to serve one batch."""
    return None if delta is None else (delta.num, delta.rank, tuple(delta.a))
