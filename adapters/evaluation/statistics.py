"""Paired comparison of two arms over the same documents. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES_PER_BLOCK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """`other` minus `base`, document by document."""

    difference: float
    """Mean difference of the scores."""
    interval_low: float
    """Lower end of the 95 % bootstrap interval of the mean difference."""
    interval_high: float
    """Upper end of it."""
    num_better: int
    """Documents on which `other` scores higher."""
    num_same: int
    """Documents on which the scores are equal."""
    num_worse: int
    """Documents on which `other` scores lower."""


def compare(
    base: Sequence[float], other: Sequence[float], *, seed: int = 0, num_resamples: int = 10_000
) -> PairedComparison:
    """Compare scores of the same documents; percentile bootstrap over documents (Efron 1979).

    Raises `ValueError` when the arms differ in length or are empty.
    """
    if len(base) != len(other) or not base:
        raise ValueError(f"both arms need the same documents, got {len(base)} and {len(other)}")
    difference_N = np.asarray(other, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    for start in range(0, num_resamples, _RESAMPLES_PER_BLOCK):
        num = min(_RESAMPLES_PER_BLOCK, num_resamples - start)
        drawn_RN = rng.integers(0, len(base), size=(num, len(base)))
        means.append(difference_N[drawn_RN].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return PairedComparison(
        difference=float(difference_N.mean()),
        interval_low=float(low),
        interval_high=float(high),
        num_better=int((difference_N > 0).sum()),
        num_same=int((difference_N == 0).sum()),
        num_worse=int((difference_N < 0).sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdicts:
    """What a gate did to the documents that the same adaptation would have changed."""

    num_harmed: int
    """Documents that score lower without the gate than unadapted."""
    num_caught: int
    """Of these, the ones that with the gate score no lower than unadapted."""
    num_helped: int
    """Documents that score higher without the gate than unadapted."""
    num_refused: int
    """Of these, the ones that with the gate score no higher than unadapted."""


def judge_gate(
    base: Sequence[float], ungated: Sequence[float], gated: Sequence[float]
) -> GateVerdicts:
    """Compare one adaptation of the same documents with and without its gate."""
    rows = list(zip(base, ungated, gated, strict=True))
    return GateVerdicts(
        num_harmed=sum(free < plain for plain, free, _ in rows),
        num_caught=sum(free < plain <= held for plain, free, held in rows),
        num_helped=sum(free > plain for plain, free, _ in rows),
        num_refused=sum(free > plain >= held for plain, free, held in rows),
    )
