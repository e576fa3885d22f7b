"""The policy loss of a step and the gradient norm of a delta. Limit: tensors in, tensors out."""

# Q = deltas; other axes as the caller has them

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.adapters.config import RefineConfig
from imprint.models import LoraDelta

# How far a ratio may be from 1 by rounding alone: sampling reads token by token, the loss in one go
_RATIO_TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.1}
_LOW_PRECISION_TOLERANCE = 1.0


def policy_losses(
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    advantages: Tensor,
    config: RefineConfig,
    *,
    compute_dtype: torch.dtype,
) -> Tensor:
    """PPO's clipped loss per token, with dual clip (arXiv 1707.06347, 1912.09729). Same shape.

    `advantages` broadcasts. One update per rollout set makes every ratio 1 and the clipping inert,
    which is asserted, up to the rounding of the model's `compute_dtype`: anything else means that
    rollouts and loss saw different weights or states.
    """
    advantages = advantages.to(logprobs.dtype)
    ratio = (logprobs - sampled_logprobs).exp()
    tolerance = _RATIO_TOLERANCE.get(compute_dtype, _LOW_PRECISION_TOLERANCE)
    drift = (ratio.detach() - 1).abs()
    # values that are not finite are the caller's to notice: they end the attempt, not the worker
    assert not ((drift > tolerance) & logprobs.isfinite() & sampled_logprobs.isfinite()).any(), (
        f"policy ratio is off by {float(drift.max()):.1e}: rollouts are not on-policy"
    )
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.minimum(losses, -advantages * config.dual_clip)
    return torch.where(advantages < 0, bounded, losses)


def clip_grads(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale the gradient of all parameters together to a norm of at most `max_norm`, in place.

    Returns the norm that it had; one that is not finite is left for the caller to notice.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.stack([grad.norm() for grad in grads]).norm())
    if math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def clip_grads_per_delta(delta: LoraDelta, max_norm: float) -> Tensor:
    """Scale each delta's gradient to a norm of at most `max_norm`, in place; returns the norms [Q].

    A delta whose norm is not finite keeps its gradient: the caller looks at the norms and gives up.
    """
    grads = [tensor.grad for tensor in delta.parameters() if tensor.grad is not None]
    if not grads:
        return torch.zeros(delta.num)
    norms_Q: Tensor = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
    scale_Q = (max_norm / norms_Q.clamp_min(1e-30)).clamp_max(1.0)
    scale_Q = torch.where(norms_Q.isfinite(), scale_Q, torch.ones_like(scale_Q))
    for grad in grads:
        grad.mul_(scale_Q.view(-1, 1, 1))
    return norms_Q
