"""From logits to tokens: entropy, counter-based random numbers, temperature and nucleus sampling.

Random numbers are pure functions of (seed, counter), so a draw does not depend on what else is in
the batch. Shapes: B = rows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def token_entropy(logits_TV: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats, over the last axis."""
    logprobs_TV = logits_TV.log_softmax(-1)
    return -(logprobs_TV.exp() * logprobs_TV).sum(-1)


def _mix(x: np.ndarray) -> np.ndarray:
    # the finaliser of splitmix64 (Steele et al. 2014)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def counter_uniform(seed: int, counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, one per counter (any shape of int64): splitmix64."""
    with np.errstate(over="ignore"):
        start = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
        bits = _mix(start + (counters.cpu().numpy().astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(uniform.reshape(tuple(counters.shape)))


def sample_tokens(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    """One token a row: the inverse of the cumulative distribution at `uniform_B`.

    Temperature 0 is greedy. `top_p` keeps the smallest set of most probable tokens whose mass
    reaches it.
    """
    greedy_B = logits_BV.argmax(-1)
    cold_B = temperature_B <= 0
    if bool(cold_B.all()):
        return greedy_B
    safe_B1 = temperature_B.masked_fill(cold_B, 1.0).unsqueeze(-1).to(logits_BV.dtype)
    probs_BV, order_BV = (
        (logits_BV / safe_B1).softmax(-1).double().sort(stable=True, dim=-1, descending=True)
    )
    mass_BV = probs_BV.cumsum(-1)
    probs_BV = probs_BV.masked_fill(mass_BV - probs_BV >= top_p_B.unsqueeze(-1), 0.0)
    mass_BV = probs_BV.cumsum(-1)
    point_B1 = uniform_B.to(mass_BV).unsqueeze(-1) * mass_BV[:, -1:]
    rank_B1 = torch.searchsorted(mass_BV, point_B1).clamp_max(logits_BV.shape[-1] - 1)
    return torch.where(cold_B, greedy_B, order_BV.gather(-1, rank_B1).squeeze(-1))
