"""Learning rates that were tried, and which of them is best. Limit: numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trial:
    """A rate that was tried."""

    learning_rate: float
    probe_nats: float | None
    """The probe after the trial, nats per token; None where its numbers were not finite."""


def best_rate(trials: Sequence[Trial]) -> float | None:
    """The rate with the best probe, the first of equals; None where none came to an end."""
    ended = [
        (trial.probe_nats, trial.learning_rate) for trial in trials if trial.probe_nats is not None
    ]
    return min(ended, key=lambda pair: pair[0])[1] if ended else None
