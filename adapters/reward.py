"""Rewards of rollouts against the document's own continuation; no label is needed.

A new reward is a new function and an entry in `_REWARDS`. Limit: reads rollouts, runs no model.
"""

# N = branches, G = rollouts per branch, K = rollout length, D = model width

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from imprint.adapters.rollout import Rollouts


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


_REWARDS: dict[str, Callable[[Rollouts, Tensor], Tensor]] = {
    "exact": exact,
    "cosine": cosine,
    "hybrid": hybrid,
    "expected_exact": expected_exact,
}


def compute_rewards(name: str, rollouts: Rollouts, truth_NK: Tensor) -> Tensor:
    """One reward per rollout [N, G] in float64; `truth_NK` is the document's continuation."""
    return _REWARDS[name](rollouts, truth_NK)
