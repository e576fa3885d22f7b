"""LaCT's fast weights in plain torch: a small SwiGLU, read by queries, stepped once a chunk.

    f(x) = W1 (silu(W0 x) * (W2 x));   a chunk's step ascends   sum_t lr_t <f(k_t), v_t>

(Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884), with a rate lr of each token for
each of the three matrices, optionally momentum and Newton-Schulz orthogonalisation (Muon), and the
rows scaled back to the norms that they had at first. Everything is differentiable, the steps too.

Shapes: B = batch, R = rows of weights (R divides B), H = heads, C = tokens of a chunk, T = tokens,
K = width of a head, E = inner width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-5  # of the row norms, outside the root
_MUON_EPS = 1e-7
_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class FastWeights(NamedTuple):
    """A SwiGLU per row and head; also what belongs to one: a step, a momentum, norms."""

    w0: Tensor
    """Gate, [R, H, E, K]."""
    w1: Tensor
    """Output, [R, H, K, E]."""
    w2: Tensor
    """Input, [R, H, E, K]."""

    def row_norms(self) -> FastWeights:
        """Norms over the last axis, which stays as an axis of one."""
        return FastWeights(*(w.norm(dim=-1, keepdim=True) for w in self))


def unit_norm(x: Tensor) -> Tensor:
    """x / (|x| + 1e-5) over the last axis; the epsilon is outside the root, unlike fla's."""
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return x / (norm + _EPS)


def read_fast_weights(weights: FastWeights, q_BHTK: Tensor) -> Tensor:
    """f(q), [B, H, T, K]. Weights of R rows serve B / R rows each, in order, uncopied.

    Rows of weights that are one and the same memory are read once.
    """
    batch, heads, num_tokens, width = q_BHTK.shape
    if all(w.stride(0) == 0 for w in weights):
        weights = FastWeights(*(w[:1] for w in weights))
    rows = weights.w0.shape[0]
    x = q_BHTK
    if rows != batch:
        x = x.reshape(rows, -1, heads, num_tokens, width).transpose(1, 2).flatten(2, 3)
    out = (F.silu(x @ weights.w0.mT) * (x @ weights.w2.mT)) @ weights.w1.mT
    if rows != batch:
        out = out.view(rows, heads, -1, num_tokens, width).transpose(1, 2)
    return out.reshape(q_BHTK.shape)


def step_fast_weights(
    weights: FastWeights,
    momentum: FastWeights | None,
    k_BHCK: Tensor,
    v_BHCK: Tensor,
    rates_BHC3: Tensor,
    decay_BHC: Tensor | None,
    norms: FastWeights,
    *,
    muon_dtype: torch.dtype | None = None,
) -> tuple[FastWeights, FastWeights | None]:
    """The weights and the momentum after a chunk.

    `rates` are the learning rates of W0, W1, W2; `decay`, there with `momentum`, says per token how
    much of the momentum stays. With `muon_dtype` the step is orthogonalised in that type, while the
    momentum keeps what it was before. The weights may have one row for all.
    """
    step = _ascent(weights, k_BHCK, v_BHCK, rates_BHC3)
    if momentum is not None:
        assert decay_BHC is not None, "momentum needs a decay"
        share = decay_BHC.mean(-1)[..., None, None]
        step = FastWeights(*(s + share * m for s, m in zip(step, momentum, strict=True)))
        momentum = step
    if muon_dtype is not None:
        step = FastWeights(*(orthogonalize(s, muon_dtype) for s in step))
    moved = zip(weights, step, norms, strict=True)
    return FastWeights(*(unit_norm(w + s) * norm for w, s, norm in moved)), momentum


def _ascent(
    weights: FastWeights, k_BHCK: Tensor, v_BHCK: Tensor, rates_BHC3: Tensor
) -> FastWeights:
    """Gradient of sum_t lr_t <f(k_t), v_t> in each matrix, with that matrix's own rates."""
    rate0, rate1, rate2 = torch.split(rates_BHC3, 1, -1)
    gate, inner = k_BHCK @ weights.w0.mT, k_BHCK @ weights.w2.mT
    sigma = gate.sigmoid()
    opened = gate * sigma
    back = v_BHCK @ weights.w1  # gradient of <f(k), v> in silu(W0 k) * (W2 k)
    in_gate = back * inner * sigma * (1 + gate * (1 - sigma))
    return FastWeights(
        in_gate.mT @ (k_BHCK * rate0),
        v_BHCK.mT @ (opened * inner * rate1),
        (back * opened).mT @ (k_BHCK * rate2),
    )


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Singular values of the last two axes moved towards one: five Newton-Schulz iterations.

    They run in `dtype` with the published coefficients; the result has the type of `matrix`.
    """
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm: Tensor = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + _MUON_EPS)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
