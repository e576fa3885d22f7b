"""What a step tried, small enough to be kept and shown: positions, rollouts, rewards.

Plain JSON values, bounded whatever the settings are: of a step with more rollout tokens than
`MAX_TOKENS`, evenly spaced positions are kept, and of a study the first `MAX_STEPS` steps.
Limit: knows token ids; knows no text.
"""

from __future__ import annotations

from typing import Any, Final

from imprint.adapters.policy import StepResult

MAX_STEPS: Final = 64
MAX_TOKENS: Final = 4096
"""Rollout tokens that are kept of one step."""


def record_branches(step: int, result: StepResult) -> list[dict[str, Any]]:
    """The branches of optimisation step `step` (from 1) of a study of one document, as one entry;
    none behind `MAX_STEPS`.

    `positions` are numbers of tokens read, `rollouts` token ids [N][G][K], `rewards` [N][G]; both
    are empty where nothing was rolled out. `num_positions` counts those left out, too.
    """
    if step > MAX_STEPS:
        return []
    positions = result.positions_QN[0].tolist()
    if result.rollouts_QNGK is None or result.rewards_QNG is None:
        kept = _spread(len(positions), MAX_TOKENS)
        rollouts, rewards = [], []
    else:
        rollouts_NGK, rewards_NG = result.rollouts_QNGK[0], result.rewards_QNG[0]
        per_position = max(rollouts_NGK[0].numel(), 1) if len(positions) else 1
        kept = _spread(len(positions), max(MAX_TOKENS // per_position, 1))
        rollouts = [_within(rollouts_NGK[i].tolist()) for i in kept]
        rewards = [rewards_NG[i].tolist()[: len(rollouts[n])] for n, i in enumerate(kept)]
    record = {
        "step": step,
        "num_positions": len(positions),
        "positions": [positions[i] for i in kept],
        "rollouts": rollouts,
        "rewards": rewards,
    }
    return [record]


def _spread(num: int, most: int) -> list[int]:
    """At most `most` of `num` indices, evenly spaced, the first among them."""
    if num <= most:
        return list(range(num))
    return [i * num // most for i in range(most)]


def _within(rollouts_GK: list[list[int]]) -> list[list[int]]:
    """The first rollouts of a position that alone has more tokens than are kept."""
    return rollouts_GK[: max(MAX_TOKENS // len(rollouts_GK[0]), 1)]
