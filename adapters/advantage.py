"""From rewards to advantages within groups (GRPO, leave-one-out, Dr. GRPO).

A group is a position where it has several rollouts; with one rollout each, all positions of a
document form one group. Groups whose rewards all tie carry no signal: their advantages are zero.
"""

# Q = documents or questions, N = positions, G = rollouts per position

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def grpo(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) over the last axis; Bessel's correction, as the published code."""
    return dr_grpo(rewards) / (rewards.std(-1, keepdim=True) + 1e-6)


def rloo(rewards: Tensor) -> Tensor:
    """r minus the mean of the other rewards of the last axis."""
    size = rewards.shape[-1]
    return dr_grpo(rewards) * (size / (size - 1))


def dr_grpo(rewards: Tensor) -> Tensor:
    """r - mean over the last axis, without the division by the spread."""
    return rewards - rewards.mean(-1, keepdim=True)


_ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": grpo,
    "rloo": rloo,
    "dr_grpo": dr_grpo,
}


def compute_advantages(name: str, rewards_QNG: Tensor) -> Tensor:
    """Advantages [Q, N, G] in float64; groups of one, and tied groups, get zeros."""
    rewards = rewards_QNG.double()
    groups = rewards if rewards.shape[-1] > 1 else rewards.mT
    if groups.shape[-1] < 2 or groups.numel() == 0:
        return rewards.new_zeros(rewards.shape)
    tied = groups.amax(-1, keepdim=True) == groups.amin(-1, keepdim=True)
    advantages = _ADVANTAGES[name](groups).masked_fill(tied, 0.0)
    return advantages if rewards.shape[-1] > 1 else advantages.mT


def count_tied_groups(rewards_QNG: Tensor) -> int:
    """Groups without signal."""
    groups = rewards_QNG if rewards_QNG.shape[-1] > 1 else rewards_QNG.mT
    return int((groups.amax(-1) == groups.amin(-1)).sum())
