"""One token a row for the (gated) delta rule, on the states of a pool, in place.

From what the projections gave for the token to what the output projection takes: short
convolutions, SiLU, normalised query and key, gates, one step of the rule, normalised read-out. This
is the plain-torch form; `triton_pool_step.py` has the same in one kernel. No gradients.
Shapes: B = rows, N = states of the pool, H = heads of queries, G = heads of values (a multiple of
H), K / V = key / value width of a head, W = taps of the convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # of queries and keys, inside the root
_CHECK_TAPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """One token a row, as projected from the layer's input."""

    q_BHK: Tensor
    k_BHK: Tensor
    v_BGV: Tensor
    beta_BG: Tensor | None
    """Before the sigmoid; None: every token is written with strength 1."""
    decay_BG: Tensor | None
    """Before bias and softplus; None: nothing fades."""
    gate_BGV: Tensor | None
    """Before SiLU; None: the read-out is not gated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWeights:
    """What a layer multiplies with on the way."""

    taps: tuple[Tensor, Tensor, Tensor] | None
    """Of queries [H * K, W], keys and values; None: no convolutions, and no tails in the pool."""
    norm_V: Tensor
    norm_eps: float
    max_beta: float = 1.0
    """1, or 2 for the variant that allows negative eigenvalues."""
    log_rate_G: Tensor | None = None
    step_bias_G: Tensor | None = None


PoolStep = Callable[[Projected, StepWeights, Mapping[str, Tensor], Tensor | None], Tensor]


@torch.no_grad()
def pool_step(
    token: Projected, weights: StepWeights, pool: Mapping[str, Tensor], rows_B: Tensor | None
) -> Tensor:
    """Read one token into each row's state of `pool`; returns the read-out [B, G, V].

    `pool` holds `S` [N, G, K, V] and the tails `conv_q`, `conv_k`, `conv_v` [N, W - 1, channels];
    row i of the batch uses state `rows_B[i]`, or state i where there are no `rows_B`. Rows must
    differ; those that do not leave nothing useful behind, as the padding of a batch may. Computes
    in float32 at least, whatever the type of the token, whose type the result has.
    """
    dtype = torch.promote_types(pool["S"].dtype, torch.float32)
    taps = weights.taps or (None, None, None)
    q, k, v = (
        _convolved(x.to(dtype), tap, pool.get(f"conv_{name}"), rows_B)
        for name, x, tap in zip("qkv", (token.q_BHK, token.k_BHK, token.v_BGV), taps, strict=True)
    )
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    group = v.shape[1] // q.shape[1]
    if group > 1:
        q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
    decay_BG = beta_BG = None
    if token.decay_BG is not None:
        assert weights.log_rate_G is not None
        assert weights.step_bias_G is not None
        step_BG = F.softplus(token.decay_BG.to(dtype) + weights.step_bias_G.to(dtype))
        decay_BG = (-weights.log_rate_G.to(dtype).exp() * step_BG).exp()
    if token.beta_BG is not None:
        beta_BG = token.beta_BG.to(dtype).sigmoid() * weights.max_beta
    in_place = pool["S"].device.type == "cpu" and pool["S"].dtype == dtype
    if rows_B is None:
        o_BGV = _step_all(q, k, v, beta_BG, decay_BG, pool["S"])
    else:
        step = _step_rows if in_place else _step_copies
        o_BGV = step(q, k, v, beta_BG, decay_BG, pool["S"], rows_B)
    o_BGV = o_BGV * q.shape[-1] ** -0.5
    o_BGV = F.rms_norm(o_BGV, o_BGV.shape[-1:], weights.norm_V.to(dtype), weights.norm_eps)
    if token.gate_BGV is not None:
        o_BGV = o_BGV * F.silu(token.gate_BGV.to(dtype))
    return o_BGV.to(token.v_BGV.dtype)


def _step_copies(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_BG: Tensor | None,
    decay_BG: Tensor | None,
    pool_NGKV: Tensor,
    rows_B: Tensor,
) -> Tensor:
    """One step of the rule on copies of the rows, all at once: S^T q [B, G, V]."""
    state_BGKV = pool_NGKV.index_select(0, rows_B).to(q.dtype)
    if decay_BG is not None:
        state_BGKV = state_BGKV * decay_BG[..., None, None]
    value_BGV = v - (k.unsqueeze(-2) @ state_BGKV).squeeze(-2)
    if beta_BG is not None:
        value_BGV = value_BGV * beta_BG.unsqueeze(-1)
    state_BGKV = state_BGKV + k.unsqueeze(-1) * value_BGV.unsqueeze(-2)
    pool_NGKV.index_copy_(0, rows_B, state_BGKV.to(pool_NGKV.dtype))
    return (q.unsqueeze(-2) @ state_BGKV).squeeze(-2)


def _step_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_BG: Tensor | None,
    decay_BG: Tensor | None,
    pool_NGKV: Tensor,
    rows_B: Tensor,
) -> Tensor:
    """The same, each row where it lies: on a CPU copying states costs more than computing.

    A state is read once, for key and query, before it is written: S_new^T q = S^T q + (k q) value.
    """
    states = [pool_NGKV[row] for row in rows_B.tolist()]
    asked_BG2K = torch.stack((k, q), 2)
    read_BG2V = torch.empty(*asked_BG2K.shape[:3], v.shape[-1], dtype=v.dtype)
    for state_GKV, asked_G2K, read_G2V in zip(
        states, asked_BG2K.unbind(), read_BG2V.unbind(), strict=True
    ):
        torch.bmm(asked_G2K, state_GKV, out=read_G2V)
    if decay_BG is not None:
        read_BG2V = read_BG2V * decay_BG[..., None, None]
        for state_GKV, decay_G in zip(states, decay_BG.unbind(), strict=True):
            state_GKV.mul_(decay_G.view(-1, 1, 1))
    value_BGV = v - read_BG2V[:, :, 0]
    if beta_BG is not None:
        value_BGV = value_BGV * beta_BG.unsqueeze(-1)
    written = zip(states, k.unsqueeze(-1).unbind(), value_BGV.unsqueeze(-2).unbind(), strict=True)
    for state_GKV, k_GK1, value_G1V in written:
        state_GKV.baddbmm_(k_GK1, value_G1V)
    return read_BG2V[:, :, 1] + (k * q).sum(-1, keepdim=True) * value_BGV


def _step_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta_BG: Tensor | None,
    decay_BG: Tensor | None,
    pool_BGKV: Tensor,
) -> Tensor:
    """As `_step_rows`, for every state of a pool at once."""
    # a view, or an error: a silent copy would be written instead of the pool
    state_MKV = pool_BGKV.view(-1, *pool_BGKV.shape[2:]).to(q.dtype)
    read_BG2V = torch.bmm(torch.stack((k, q), 2).flatten(0, 1), state_MKV).view(*v.shape[:2], 2, -1)
    if decay_BG is not None:
        read_BG2V = read_BG2V * decay_BG[..., None, None]
        state_MKV.mul_(decay_BG.view(-1, 1, 1))
    value_BGV = v - read_BG2V[:, :, 0]
    if beta_BG is not None:
        value_BGV = value_BGV * beta_BG.unsqueeze(-1)
    state_MKV.baddbmm_(k.flatten(0, 1).unsqueeze(2), value_BGV.flatten(0, 1).unsqueeze(1))
    if state_MKV.dtype != pool_BGKV.dtype:
        pool_BGKV.copy_(state_MKV.view_as(pool_BGKV))
    return read_BG2V[:, :, 1] + (k * q).sum(-1, keepdim=True) * value_BGV


def _convolved(
    x_BHD: Tensor, taps_CW: Tensor | None, tails: Tensor | None, rows_B: Tensor | None
) -> Tensor:
    """SiLU of the short convolution at the new token; moves the rows' tails on by it."""
    if taps_CW is None:
        return F.silu(x_BHD)
    assert tails is not None
    x_B1C = x_BHD.flatten(1).unsqueeze(1)
    own = tails if rows_B is None else tails.index_select(0, rows_B)
    joined_BWC = torch.cat((own.to(x_BHD.dtype), x_B1C), 1)
    if rows_B is None:
        tails.copy_(joined_BWC[:, 1:])
    else:
        tails.index_copy_(0, rows_B, joined_BWC[:, 1:].to(tails.dtype))
    y_BC = (joined_BWC * taps_CW.to(x_BHD.dtype).mT).sum(1)
    return F.silu(y_BC).view_as(x_BHD)


def find_error(step: PoolStep, shape_GKV: tuple[int, int, int], device: torch.device) -> float:
    """Largest relative error, in the norm, of one random `step` against the plain one.

    Of states of this shape, with convolutions and every gate: a check before a kernel is used.
    """
    values, key_width, value_width = shape_GKV
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    widths = {"q": values * key_width, "k": values * key_width, "v": values * value_width}
    q, k, v = (normal(2, values, width // values) for width in widths.values())
    token = Projected(
        q_BHK=q,
        k_BHK=k,
        v_BGV=v,
        beta_BG=normal(2, values),
        decay_BG=normal(2, values),
        gate_BGV=normal(*v.shape),
    )
    q_taps, k_taps, v_taps = (normal(width, _CHECK_TAPS) for width in widths.values())
    weights = StepWeights(
        taps=(q_taps, k_taps, v_taps),
        norm_V=normal(value_width),
        norm_eps=1e-6,
        log_rate_G=normal(values),
        step_bias_G=normal(values),
    )
    tails = {f"conv_{name}": normal(3, _CHECK_TAPS - 1, width) for name, width in widths.items()}
    pool = {"S": normal(3, *shape_GKV), **tails}
    expected = {name: tensor.clone() for name, tensor in pool.items()}
    rows_B = torch.tensor([2, 1], device=device)
    pairs = [
        (step(token, weights, pool, rows_B), pool_step(token, weights, expected, rows_B)),
        *((pool[name], expected[name]) for name in pool),
    ]
    errors = torch.stack([(mine - right).norm() / right.norm() for mine, right in pairs])
    return float(errors.max())  # NaN if any is
