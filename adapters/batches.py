"""Runs calls of several studies together, wherever that gives each what it would get alone.

On a CPU a product's rounding may depend on how many rows it has, on the machine's BLAS and on
shapes. So a kind of batch is computed both ways when it first comes up, and is used from then on
only if every bit agreed, of the results and of what they are made from. Limit: knows calls; knows
no job, no time and no fairness.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Final

from torch import Tensor

from imprint.adapters.calls import Call
from imprint.models import FastWeightModel, RecurrentState

log = logging.getLogger(__name__)

MAX_KNOWN: Final = 4096
"""Kinds of batches that are remembered; the least recently used is forgotten first."""


class Batches:
    """What is known of the batches of one model on one device."""

    def __init__(self, *, exact: bool, shared: bool = True) -> None:
        """`exact`: results must be those of each call alone, bit for bit. A GPU's need not be.
        Without `shared`, every call runs alone."""
        self.exact, self.shared = exact, shared
        self.num_tried = 0
        """Batches that were computed both ways."""
        self._same: OrderedDict[tuple[Hashable, int], bool] = OrderedDict()
        self._most: OrderedDict[Hashable, int] = OrderedDict()

    def most(self, call: Call[Any]) -> int | None:
        """How many calls like this one may run together; None: any number."""
        return 1 if call.key is None or not self.shared else self._most.get(call.key)

    def run(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """The result of each, or the error with which it failed alone. All have the same key."""
        if len(calls) > 1:
            results = self._together(calls)
            if results is not None:
                return results
        return [_alone(call) for call in calls]

    def _together(self, calls: Sequence[Call[Any]]) -> list[Any] | None:
        kind = (calls[0].key, len(calls))
        same = self._same.get(kind)
        if same is False:
            return None
        try:
            results = calls[0].together(calls)
        except (RuntimeError, MemoryError, AssertionError) as error:
            log.warning("a batch of %d failed (%s); trying each alone", len(calls), error)
            _remember(self._most, kind[0], len(calls) // 2)
            return None
        if same is None and self.exact:
            return self._compare(kind, calls, results)
        self._same.move_to_end(kind) if same else None
        return results

    def _compare(
        self, kind: tuple[Hashable, int], calls: Sequence[Call[Any]], results: list[Any]
    ) -> list[Any]:
        """The results of each alone; remembers whether those of the batch are the same."""
        self.num_tried += 1
        alone = [_alone(call) for call in calls]
        if any(isinstance(result, Exception) for result in alone):
            return alone
        same = all(map(same_bits, results, alone)) and _same_witness(calls)
        _remember(self._same, kind, same)
        if not same:
            log.info("batches of %s are rounded otherwise than alone; they run alone", kind[0])
            _remember(self._most, kind[0], 1)
        return alone


def _same_witness(calls: Sequence[Call[Any]]) -> bool:
    try:
        together = calls[0].witness(calls)
        apart = [result for call in calls for result in call.witness([call])]
    except (RuntimeError, MemoryError, AssertionError) as error:
        log.warning("a batch of %d cannot be compared (%s); it runs alone", len(calls), error)
        return False
    return all(map(same_bits, together, apart))


def _alone(call: Call[Any]) -> Any:
    try:
        return call.alone()
    except (RuntimeError, MemoryError, AssertionError) as error:
        return error


def _remember(known: OrderedDict[Any, Any], key: Hashable, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)


def same_bits(mine: Any, theirs: Any) -> bool:
    """Whether two results hold the same numbers; not-a-numbers are the same."""
    if isinstance(mine, Tensor):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return False
        return bool(((mine == theirs) | ((mine != mine) & (theirs != theirs))).all())
    if isinstance(mine, RecurrentState):
        return same_bits(mine.tensors(), theirs.tensors())
    if dataclasses.is_dataclass(mine):
        names = [field.name for field in dataclasses.fields(mine)]
        return all(same_bits(getattr(mine, name), getattr(theirs, name)) for name in names)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same_bits, mine, theirs))
    return bool(mine == theirs or (mine != mine and theirs != theirs))


def batches_for(model: FastWeightModel) -> Batches:
    """Exact on a CPU, where a model whose rounding depends on its company shares nothing."""
    exact = model.device.type == "cpu"
    return Batches(exact=exact, shared=model.rounds_rows_alike or not exact)
