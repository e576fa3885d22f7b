"""From logits to tokens: entropy, counter-based random numbers, temperature and nucleus sampling.

Random numbers are pure functions of (seed, counter), so a draw does not depend on what else is in
the batch. Shapes: B = rows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    seeds = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return _uniform(seeds, counters.cpu().numpy().reshape(-1)).view(counters.shape)


def counter_uniforms(seeds: Sequence[int], counters: Sequence[int]) -> Tensor:
    """The numbers of `counter_uniform` at (seeds[i], counters[i]), in one go: float64 [B]."""
    masked = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    return _uniform(masked, np.array(counters, dtype=np.int64))


def _uniform(seeds: np.ndarray, counters: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):
        start = _mix(seeds + _GOLDEN)
        bits = _mix(start + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(uniform)


def penalize(
    logits_V: Tensor, tokens: Sequence[int], *, presence: float, frequency: float
) -> Tensor:
    """New logits, lower for what was generated: by `presence` once and `frequency` each time.

    The penalties of the OpenAI API; negative ones make repetition likelier.
    """
    counts_V = torch.bincount(
        torch.tensor(tokens, dtype=torch.long, device=logits_V.device),
        minlength=logits_V.shape[-1],
    )
    return logits_V - presence * (counts_V > 0) - frequency * counts_V


def token_logprobs(logits_V: Tensor, token: int, num: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token in nats, and the `num` likeliest tokens with theirs, best first.

    Of the model's own distribution: before temperature, top_p and penalties.
    """
    logprobs_V = logits_V.float().log_softmax(-1)
    top = logprobs_V.topk(min(num, logprobs_V.shape[-1]))
    ranked = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return float(logprobs_V[token]), ranked


def sample_tokens(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    """One token a row: the inverse of the cumulative distribution at `uniform_B`.

    Temperature 0 is greedy. `top_p` keeps the smallest set of most probable tokens whose mass
    reaches it.
    """
    tokens_B = logits_BV.argmax(-1)
    hot_B = temperature_B > 0
    if not bool(hot_B.any()):
        return tokens_B
    for rows_B, draw in ((hot_B & (top_p_B >= 1), _draw), (hot_B & (top_p_B < 1), _draw_nucleus)):
        rows_R = rows_B.nonzero().squeeze(-1)
        if len(rows_R):
            logits_RV = logits_BV[rows_R]
            warm_R1 = temperature_B[rows_R].unsqueeze(-1).to(logits_BV.dtype)
            probs_RV = (logits_RV / warm_R1).softmax(-1).double()
            tokens_B[rows_R] = draw(probs_RV, top_p_B[rows_R], uniform_B[rows_R])
    return tokens_B


def _draw(probs_BV: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    """From the whole distribution, tokens in the order of their ids."""
    mass_BV = probs_BV.cumsum(-1)
    point_B1 = uniform_B.to(mass_BV).unsqueeze(-1) * mass_BV[:, -1:]
    ids_B1 = torch.searchsorted(mass_BV, point_B1)
    return ids_B1.clamp_max(probs_BV.shape[-1] - 1).squeeze(-1)


def _draw_nucleus(probs_BV: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    """From the most probable tokens, the likeliest first. Sorting is what it costs."""
    probs_BV, order_BV = probs_BV.sort(stable=True, dim=-1, descending=True)
    mass_BV = probs_BV.cumsum(-1)
    probs_BV = probs_BV.masked_fill(mass_BV - probs_BV >= top_p_B.unsqueeze(-1), 0.0)
    return order_BV.gather(-1, _draw(probs_BV, top_p_B, uniform_B).unsqueeze(-1)).squeeze(-1)
