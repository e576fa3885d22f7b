"""Rewards of rollouts against the document's own continuation; no label is needed.

A new reward is a new function and an entry in `_REWARDS`. Limit: reads rollouts, runs no model.
"""

# N = branches, G = rollouts per branch, K = rollout length, D = model width

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.adapters.config import NO_ENCODER
from imprint.adapters.errors import ConfigError
from imprint.adapters.rollout import Rollouts
from imprint.adapters.similarity import Similarity

_LONGEST_GRAM: Final = 4


def exact(rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """Share of the tokens that equal the document's, place by place. In 0..1."""
    return (rollouts.tokens_NGK == truth_NK.unsqueeze(1)).double().mean(-1)


def cosine(rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """Mean cosine of the hidden states after each rolled-out token and after the document's token.

    Last layer, after the final norm. In -1..1.
    """
    if rollouts.hidden_NGKD is None or rollouts.truth_hidden_NKD is None:
        raise ValueError("the cosine reward needs rollouts sampled with hidden states")
    truth_N1KD = rollouts.truth_hidden_NKD.unsqueeze(1)
    return F.cosine_similarity(rollouts.hidden_NGKD, truth_N1KD, dim=-1).double().mean(-1)


def hybrid(rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """The plain sum of `cosine` and `exact`. In -1..2."""
    return cosine(rollouts, truth_NK) + exact(rollouts, truth_NK)


def expected_exact(rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """Mean probability of the document's token given the rollout so far. In 0..1.

    The expectation of `exact` over the next token: the same mean, a lower variance.
    """
    return rollouts.truth_logprobs_NGK.double().exp().mean(-1)


def ngram(rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """Overlap of n-grams, n = 1 ... min(4, K): the smoothed BLEU of Lin and Och (2004). In 0..1.

    Geometric mean over n of (matches + 1) / (n-grams + 1), for n = 1 of matches / n-grams: without
    a token in common it is 0. A gram of the document is matched as often as it stands there.
    """
    orders = range(1, min(_LONGEST_GRAM, truth_NK.shape[1]) + 1)
    logs_NG = torch.zeros(rollouts.tokens_NGK.shape[:2], dtype=torch.float64)
    for order in orders:
        num = truth_NK.shape[1] - order + 1
        matches_NG = _matches(rollouts.tokens_NGK, truth_NK, order)
        smoothing = 0 if order == 1 else 1
        logs_NG += ((matches_NG + smoothing) / (num + smoothing)).log()
    return (logs_NG / len(orders)).exp().to(truth_NK.device)


def _matches(tokens_NGK: Tensor, truth_NK: Tensor, order: int) -> Tensor:
    """How many n-grams of each rollout are matched by one of the document's: [N, G]."""
    counts = []
    for rollouts_GK, truth_K in zip(tokens_NGK.tolist(), truth_NK.tolist(), strict=True):
        there = _grams(truth_K, order)
        counts.append([(_grams(rollout_K, order) & there).total() for rollout_K in rollouts_GK])
    return torch.tensor(counts, dtype=torch.float64)


def _grams(tokens: list[int], order: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(order)), strict=False))


def edit(rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """1 - Levenshtein distance / K: a token left out or put in costs one place. In 0..1."""
    tokens_NGK, length = rollouts.tokens_NGK, truth_NK.shape[1]
    truth_N1K = truth_NK.unsqueeze(1).expand_as(tokens_NGK)
    row = [torch.full(tokens_NGK.shape[:2], j, device=truth_NK.device) for j in range(length + 1)]
    for i in range(length):
        below = [row[0] + 1]
        for j in range(length):
            changed_NG = row[j] + (tokens_NGK[..., i] != truth_N1K[..., j])
            below.append(torch.minimum(torch.minimum(row[j + 1], below[j]) + 1, changed_NG))
        row = below
    return 1 - row[length].double() / length


_REWARDS: dict[str, Callable[[Rollouts, Tensor], Tensor]] = {
    "exact": exact,
    "cosine": cosine,
    "hybrid": hybrid,
    "expected_exact": expected_exact,
    "ngram": ngram,
    "edit": edit,
}


def compute_rewards(
    name: str, rollouts: Rollouts, truth_NK: Tensor, similarity: Similarity | None = None
) -> Tensor:
    """One reward per rollout [N, G] in float64; `truth_NK` is the document's continuation.

    `similarity` is for the reward `semantic`, the cosine of the texts' vectors, in -1..1. Raises
    ConfigError where it is needed and not given.
    """
    if name == "semantic":
        if similarity is None:
            raise ConfigError("reward", NO_ENCODER)
        return similarity.cosines(rollouts.tokens_NGK, truth_NK)
    return _REWARDS[name](rollouts, truth_NK)
