"""Which positions of a document a step works on: by entropy, by what was written, by questions.

A position p is a number of document tokens read: the branch there predicts x[p : p + k]. Scores are
held at index p - 1, the last token read. Limit: arithmetic on scores; no model is run here.
"""

# T = tokens of the document, N = selected positions

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.adapters.config import RefineConfig
from imprint.models import counter_uniform

_SELECTION_STREAM = 1 << 60  # keeps selection draws apart from the rollouts' in the same seed


def smooth_entropy(entropy_T: Tensor, width: int) -> Tensor:
    """Average over `width` (odd) neighbours; at the ends over those that exist."""
    if width == 1 or entropy_T.numel() == 0:
        return entropy_T
    pad = width // 2
    rows = entropy_T.view(1, 1, -1)
    return F.avg_pool1d(rows, width, stride=1, padding=pad, count_include_pad=False).view(-1)


def allowed_positions(
    num_tokens: int, config: RefineConfig, excluded_T: Tensor | None = None
) -> Tensor:
    """The positions a branch may leave from, ascending; empty for documents of up to k tokens.

    The margins shrink where the document is too short to hold `config.positions` between them.
    `excluded_T[i]` holds token i out: no continuation may cover it.
    """
    length = config.rollout_length
    spare = (num_tokens - length - config.positions) // 2
    margin = min(config.margin_tokens, max(spare, 0))
    first, last = max(1, margin), num_tokens - max(length, margin)
    if last < first:
        return torch.empty(0, dtype=torch.long)
    positions_N = torch.arange(first, last + 1)
    if excluded_T is None:
        return positions_N
    held_out = F.pad(excluded_T.cpu().long().cumsum(0), (1, 0))
    return positions_N[held_out[positions_N + length] == held_out[positions_N]]


def select_positions(
    entropy_T: Tensor,
    config: RefineConfig,
    *,
    seed: int,
    step: int,
    excluded_T: Tensor | None = None,
    write_T: Tensor | None = None,
) -> Tensor:
    """One position in each of c equal segments of the document, margins apart, in ascending order.

    Within a segment the position is drawn from softmax(entropy / tau) or by `config.selection`;
    `write` needs `write_T` and draws over the whole document, see `write_positions`. Short
    documents give fewer positions, documents of up to k tokens none.
    """
    if config.selection == "write":
        if write_T is None:
            raise ValueError("selection by write needs the writing strengths of a reading")
        return write_positions(write_T, config, seed=seed, step=step, excluded_T=excluded_T)
    positions_N = allowed_positions(entropy_T.numel(), config, excluded_T)
    scores_T = smooth_entropy(entropy_T.double().cpu(), config.smoothing_width)
    counters = _SELECTION_STREAM + (step << 20) + torch.arange(config.positions)
    uniform = counter_uniform(seed, counters)
    chosen = [
        segment[_choose(scores_T[segment - 1], config, float(uniform[i]))]
        for i, segment in enumerate(positions_N.tensor_split(config.positions))
        if len(segment)
    ]
    return torch.stack(chosen) if chosen else positions_N


def _choose(scores: Tensor, config: RefineConfig, uniform: float) -> int:
    if config.selection == "argmax":
        return int(scores.argmax())
    if config.selection == "argmin":
        return int(scores.argmin())
    if config.selection == "uniform":
        scores = torch.zeros_like(scores)
    mass = (scores / config.selection_temperature).softmax(0).cumsum(0)
    return min(int(torch.searchsorted(mass, uniform * mass[-1])), len(scores) - 1)


def write_positions(
    write_T: Tensor,
    config: RefineConfig,
    *,
    seed: int,
    step: int,
    excluded_T: Tensor | None = None,
) -> Tensor:
    """Up to c positions whose next k tokens the memory wrote most strongly, ascending.

    What a trained memory writes is what it has learnt to be asked for. Drawn over the whole
    document from softmax(gamma * z), without replacement (Gumbel top-c) and more than k / 2 tokens
    apart; z is the mean strength of the k tokens, in standard deviations over the document.
    """
    length = config.rollout_length
    positions_N = allowed_positions(write_T.numel(), config, excluded_T)
    if len(positions_N) == 0:
        return positions_N
    sums = F.pad(write_T.double().cpu().cumsum(0), (1, 0))
    strength_N = (sums[positions_N + length] - sums[positions_N]) / length
    spread = strength_N.std(correction=0).clamp_min(1e-12)
    uniform_N = counter_uniform(seed, _SELECTION_STREAM + (step << 40) + positions_N)
    noise_N = -(-uniform_N.log()).log()
    noisy_N = noise_N + config.write_gamma * (strength_N - strength_N.mean()) / spread
    chosen: list[Tensor] = []
    while len(chosen) < config.positions and bool(noisy_N.isfinite().any()):
        best = positions_N[noisy_N.argmax()]
        chosen.append(best)
        noisy_N[(positions_N - best).abs() <= length // 2] = -torch.inf
    return torch.stack(chosen).sort().values if chosen else positions_N[:0]


def focus_positions(
    entropy_T: Tensor,
    relevance_T: Tensor,
    config: RefineConfig,
    *,
    seed: int,
    step: int,
    excluded_T: Tensor | None = None,
) -> Tensor:
    """Up to c distinct positions from softmax(entropy / tau + gamma * relevance), ascending.

    Drawn over the whole document, without replacement (Gumbel top-c); the entropies are smoothed. A
    share `focus_spread` of them takes the relevance from up to 1.5 windows further on, for answers
    that stand before the question's terms.
    """
    positions_N = allowed_positions(entropy_T.numel(), config, excluded_T)
    num = min(config.positions, len(positions_N))
    num_spread = min(round(config.positions * config.focus_spread), num)
    smooth_T = smooth_entropy(entropy_T.double().cpu(), config.smoothing_width)
    uniform_N = counter_uniform(seed, _SELECTION_STREAM + (step << 40) + positions_N)
    noise_N = -(-uniform_N.log()).log() + (smooth_T / config.selection_temperature)[positions_N - 1]
    chosen_N = torch.zeros(len(positions_N), dtype=torch.bool)
    ahead_T = _best_ahead(relevance_T.double(), config.focus_window * 3 // 2)
    for scores_T, count in ((relevance_T.double(), num - num_spread), (ahead_T, num_spread)):
        noisy_N = noise_N + config.focus_gamma * scores_T[positions_N - 1]
        chosen_N[noisy_N.masked_fill(chosen_N, -torch.inf).topk(count).indices] = True
    return positions_N[chosen_N]


def _best_ahead(relevance_T: Tensor, num_tokens: int) -> Tensor:
    """The largest relevance from each place to `num_tokens` further on: [T]."""
    if relevance_T.numel() == 0:
        return relevance_T
    padded = F.pad(relevance_T, (0, num_tokens)).view(1, 1, -1)
    return F.max_pool1d(padded, num_tokens + 1, stride=1).view(-1)
