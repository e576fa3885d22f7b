"""What a study says of itself: the numbers of a step, and of its end. Limit: plain values only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from imprint.adapters.gate import ProbeResult, Verdict
from imprint.adapters.held_out import HeldOut
from imprint.adapters.policy import StepResult
from imprint.adapters.progress import Candidate
from imprint.adapters.trials import Trial, best_rate


def step_event(
    step: int,
    steps: int,
    result: StepResult,
    norm: float,
    base: ProbeResult,
    best: Candidate | None,
) -> dict[str, Any]:
    """The numbers of step `step` (from 1) of `steps`; `norm` is that of its gradient."""
    event: dict[str, Any] = {
        "step": step,
        "steps": steps,
        "ntp_loss": _mean(result.ntp_loss_Q),
        "policy_loss": _mean(result.policy_loss_Q),
        "grad_norm": norm,
        "probe_base_nats": base.mean,
        "probe_nats": best.probe.mean if best else base.mean,
        "num_positions": int(result.positions_QN.shape[1]),
    }
    if result.rewards_QNG is not None:
        event["reward_mean"] = float(result.rewards_QNG.mean())
        event["reward_std"] = float(result.rewards_QNG.std(correction=0))
    if result.entropy_mean is not None:
        event["entropy_mean"] = float(result.entropy_mean)
    return event


def study_result(
    chosen: Candidate | None,
    best: Candidate | None,
    verdict: Verdict,
    base: ProbeResult | None,
    alpha: float | None,
    trials: Sequence[Trial] = (),
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """How a study ended, as its manifest and its client are told."""
    after = chosen or best
    result = {
        "accepted": chosen is not None,
        "reason": verdict.reason,
        "alpha": alpha,
        "best_step": best.step if best else None,
        "probe_before": base.mean if base else None,
        "probe_after": after.probe.mean if after else None,
        "probe_gain_nats": verdict.gain_nats,
        "probe_gain_error_nats": verdict.gain_error_nats,
        "neutral_rise_nats": verdict.neutral_rise_nats,
    }
    if held_out is not None:
        result["held_out_gain_nats"] = held_out.gain_nats
        result["held_out_gain_error_nats"] = held_out.gain_error_nats
    if trials:
        result["learning_rate"] = best_rate(trials)
        result["trials"] = [asdict(trial) for trial in trials]
    return {name: _plain(value) for name, value in result.items()}


def refused(reason: str) -> Verdict:
    """The verdict on a study that has nothing to judge."""
    return Verdict(
        accepted=False, reason=reason, gain_nats=0.0, gain_error_nats=0.0, neutral_rise_nats=None
    )


def is_finite(result: StepResult) -> bool:
    """Whether the losses of a step are numbers."""
    losses = (result.ntp_loss_Q, result.policy_loss_Q)
    return all(bool(loss.isfinite().all()) for loss in losses if loss is not None)


def _mean(loss_Q: Tensor | None) -> float | None:
    return None if loss_Q is None else float(loss_Q.mean())


def _plain(value: Any) -> Any:
    # JSON knows no NaN or infinity
    return None if isinstance(value, float) and not math.isfinite(value) else value
