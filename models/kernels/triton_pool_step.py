"""The decode step of `pool_step.py` as one Triton kernel: a program per row and head of queries.

States and tails are read and written where they lie; nothing is gathered and nothing allocated but
the result and its float32 draft. Limit: float32 states, keys up to 256 wide. Compiles for
GPUs, but has run in Triton's interpreter only.
Shapes: as in `pool_step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from imprint.models.kernels.pool_step import NORM_EPS, Projected, StepWeights

MAX_KEY_WIDTH = 256
_TILE = 16384  # floats of a state that a program holds at once: 64 a thread


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _convolved(
    x,
    tail,
    taps,
    row,
    slot,
    width,
    at,
    mask,
    TAPS: tl.constexpr,
    TAP_BLOCK: tl.constexpr,
):
    """SiLU of the convolution at the channels `at`; moves their tail on by one token."""
    y = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if TAPS > 0:
        now = y
        y = now * tl.load(taps + at * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
        if TAPS > 1:
            tap = tl.arange(0, TAP_BLOCK)[:, None]
            inside = (tap < TAPS - 1) & mask[None, :]
            cell = tail + (slot * (TAPS - 1) + tap) * width + at[None, :]
            old = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(taps + at[None, :] * TAPS + tap, mask=inside, other=0.0)
            y += tl.sum(old * weight.to(tl.float32), axis=0)
            # a small block lies in several threads' registers: all must have read before one writes
            tl.debug_barrier()
            tl.store(cell - width, old, mask=inside & (tap > 0))
            tl.store(tail + (slot * (TAPS - 1) + TAPS - 2) * width + at, now, mask=mask)
    return _silu(y)


@triton.jit
def _pool_step(
    q,
    k,
    v,
    beta,
    decay,
    gate,
    draft,
    out,
    q_taps,
    k_taps,
    v_taps,
    norm,
    log_rate,
    step_bias,
    state,
    q_tail,
    k_tail,
    v_tail,
    rows,
    qk_eps,
    norm_eps,
    max_beta,
    scale,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TAPS: tl.constexpr,
    TAP_BLOCK: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    slot = tl.load(rows + row).to(tl.int64)
    key = tl.arange(0, BLOCK_K)
    in_k = key < K
    at, width = head * K + key, num_heads * K
    q_K = _convolved(q, q_tail, q_taps, row, slot, width, at, in_k, TAPS, TAP_BLOCK)
    k_K = _convolved(k, k_tail, k_taps, row, slot, width, at, in_k, TAPS, TAP_BLOCK)
    q_K = q_K / tl.sqrt(tl.sum(q_K * q_K, axis=0) + qk_eps)
    k_K = k_K / tl.sqrt(tl.sum(k_K * k_K, axis=0) + qk_eps)
    for g in tl.static_range(GROUP):
        value_head = head * GROUP + g
        gate_at = row * num_heads * GROUP + value_head  # of [B, G]
        kept = 1.0
        if HAS_DECAY:
            step = tl.load(decay + gate_at).to(tl.float32) + tl.load(step_bias + value_head)
            step = tl.maximum(step, 0.0) + tl.log(1 + tl.exp(-tl.abs(step)))  # softplus
            kept = tl.exp(-tl.exp(tl.load(log_rate + value_head)) * step)
        strength = 1.0
        if HAS_BETA:
            strength = max_beta / (1 + tl.exp(-tl.load(beta + gate_at).to(tl.float32)))
        squares = 0.0
        for start in tl.static_range(0, V, BLOCK_V):
            value = start + tl.arange(0, BLOCK_V)
            in_v = value < V
            v_at = value_head * V + value
            v_width = num_heads * GROUP * V
            v_V = _convolved(v, v_tail, v_taps, row, slot, v_width, v_at, in_v, TAPS, TAP_BLOCK)
            first = (slot * num_heads * GROUP + value_head) * K
            cells = state + (first + key[:, None]) * V + value[None, :]
            inside = in_k[:, None] & in_v[None, :]
            s_KV = tl.load(cells, mask=inside, other=0.0) * kept
            write = (v_V - tl.sum(k_K[:, None] * s_KV, axis=0)) * strength
            s_KV += k_K[:, None] * write[None, :]
            tl.debug_barrier()  # as in _convolved
            tl.store(cells, s_KV, mask=inside)
            read = tl.sum(q_K[:, None] * s_KV, axis=0) * scale
            squares += tl.sum(read * read, axis=0)
            tl.store(draft + gate_at * V + value, read, mask=in_v)
        tl.debug_barrier()
        root = tl.sqrt(squares / V + norm_eps)
        for start in tl.static_range(0, V, BLOCK_V):
            value = start + tl.arange(0, BLOCK_V)
            in_v = value < V
            o_at = gate_at * V + value
            o_V = tl.load(draft + o_at, mask=in_v, other=0.0) / root
            o_V *= tl.load(norm + value, mask=in_v, other=0.0).to(tl.float32)
            if HAS_GATE:
                o_V *= _silu(tl.load(gate + o_at, mask=in_v, other=0.0).to(tl.float32))
            tl.store(out + o_at, o_V, mask=in_v)


def supports(state_NGKV: Tensor) -> bool:
    """Whether the kernel can step these states."""
    return state_NGKV.dtype == torch.float32 and state_NGKV.shape[2] <= MAX_KEY_WIDTH


@torch.no_grad()
def pool_step(
    token: Projected, weights: StepWeights, pool: Mapping[str, Tensor], rows_B: Tensor | None
) -> Tensor:
    """`imprint.models.kernels.pool_step.pool_step` in one launch, for states it `supports`."""
    batch, heads, key_width = token.q_BHK.shape
    state = pool["S"]
    assert supports(state)
    if rows_B is None:
        rows_B = torch.arange(batch, device=state.device)
    # written in place: a copy made contiguous would be written instead
    assert all(tensor.is_contiguous() for tensor in pool.values())
    v_BGV = token.v_BGV.contiguous()
    draft, out = torch.empty_like(v_BGV, dtype=torch.float32), torch.empty_like(v_BGV)
    taps = weights.taps or (None, None, None)
    num_taps = 0 if weights.taps is None else weights.taps[0].shape[1]
    block_k = max(16, triton.next_power_of_2(key_width))
    block_v = min(max(16, triton.next_power_of_2(v_BGV.shape[2])), _TILE // block_k)
    inputs = (
        *(token.q_BHK, token.k_BHK, v_BGV),
        *(token.beta_BG, token.decay_BG, token.gate_BGV),
    )
    parameters = (*taps, weights.norm_V, weights.log_rate_G, weights.step_bias_G)
    _pool_step[(batch, heads)](
        *(None if x is None else x.contiguous() for x in inputs),
        draft,
        out,
        *(None if x is None else x.contiguous() for x in parameters),
        state,
        *(pool.get(f"conv_{name}") for name in "qkv"),
        rows_B,
        NORM_EPS,
        weights.norm_eps,
        weights.max_beta,
        key_width**-0.5,
        GROUP=v_BGV.shape[1] // heads,
        K=key_width,
        V=v_BGV.shape[2],
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        TAPS=num_taps,
        TAP_BLOCK=triton.next_power_of_2(max(num_taps - 1, 1)),
        HAS_BETA=token.beta_BG is not None,
        HAS_DECAY=token.decay_BG is not None,
        HAS_GATE=token.gate_BGV is not None,
        num_warps=8 if block_k * block_v > _TILE // 2 else 4,
    )
    return out
