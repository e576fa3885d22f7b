"""Does what a study learns carry over to what it has not studied yet? Told after its first steps.

With selection by `write` the first steps leave out every second place that judges. Half of what
they learnt, or what else is given to answers, must recall those better than the base on average;
the gate asks for certainty at the end, of all places. Limit: numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

from imprint.adapters.config import RefineConfig
from imprint.adapters.gate import ProbeResult, judge

REFUSAL = "what was held out of the first steps was not recalled better"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The trial's outcome at one factor."""

    alpha: float
    """By what factor the delta was scaled."""
    passed: bool
    gain_nats: float
    """Mean improvement over the places that had not been studied, nats per token."""
    gain_error_nats: float
    """Standard error of that mean."""


def judge_held_out(
    base: ProbeResult, adapted: ProbeResult, config: RefineConfig, alpha: float
) -> HeldOut:
    """Compare the places that were held out: every second one, as `probe_places` has it."""
    before, after = ProbeResult(base.nll_P[::2]), ProbeResult(adapted.nll_P[::2])
    verdict = judge(before, after, config.replace(probe_confidence=0.0), neutral_rise_nats=None)
    return HeldOut(alpha, verdict.accepted, verdict.gain_nats, verdict.gain_error_nats)
