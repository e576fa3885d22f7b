"""Small statistics of measured values. Pure functions."""

import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed (nearest rank)."""
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    rank = -(-share * len(ordered) // 1)  # rounded up
    return ordered[min(max(int(rank) - 1, 0), len(ordered) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest; empty where there are none."""
    if not values:
        return {}
    return {
        "p50": percentile(values, 0.5),
        "p95": percentile(values, 0.95),
        "p99": percentile(values, 0.99),
        "max": max(values),
    }


def ratio(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of values that were measured in pairs: the median of their ratios, the least and largest."""
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
