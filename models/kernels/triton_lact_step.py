"""The decode step of `lact_step.py` as Triton kernels, on rings and fast weights where they lie.

One kernel attends, a program per row and head with a running softmax; two read the fast weights,
the inner values first and then the output, a program per row, head and block of them. Limit: rings
in float32, bfloat16 or float16, fast weights in float32. Compiles for GPUs, but has run in Triton's
interpreter only.
Shapes: as in `lact_step.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from imprint.models.kernels.lact import FastWeights
from imprint.models.kernels.lact_step import StepRows

_RING_TILE = 8192  # numbers of keys that a program holds at once
_WEIGHT_TILE = 8192  # numbers of a matrix that a program holds at once


@triton.jit
def _attend(
    q, k, v, out, rows, places, scale,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    slot, place = tl.load(rows + row).to(tl.int64), tl.load(places + row)
    number = tl.arange(0, BLOCK_K)
    inside = number < WIDTH
    own = (row * num_heads + head) * WIDTH + number
    q_K = tl.load(q + own, mask=inside, other=0.0).to(tl.float32) * scale
    seen = tl.minimum(place + 1, WINDOW)
    acc_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    total = tl.sum(acc_K, axis=0)  # 0, of the type that the loop gives it
    best = total - float("inf")
    for start in range(0, tl.minimum(place + 1, SIZE), BLOCK_L):
        at = start + tl.arange(0, BLOCK_L)
        # how long ago, of a dividend that is not negative: Triton rounds towards zero
        live = (at < SIZE) & ((place + SIZE - at) % SIZE < seen)
        cell = ((slot * SIZE + at[:, None]) * num_heads + head) * WIDTH + number[None, :]
        mask = live[:, None] & inside[None, :]
        k_LK = tl.load(k + cell, mask=mask, other=0.0).to(tl.float32)
        score_L = tl.where(live, tl.sum(k_LK * q_K[None, :], axis=1), float("-inf"))
        highest = tl.maximum(best, tl.max(score_L, axis=0))
        # a block of nothing seen, before anything was
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weight_L = tl.exp(score_L - shift)
        fade = tl.exp(best - shift)
        v_LK = tl.load(v + cell, mask=mask, other=0.0).to(tl.float32)
        acc_K = acc_K * fade + tl.sum(weight_L[:, None] * v_LK, axis=0)
        total = total * fade + tl.sum(weight_L, axis=0)
        best = highest
    tl.store(out + own, acc_K / total, mask=inside)


@triton.jit
def _inner(
    x, own_w0, own_w2, start_w0, start_w2, inner, rows, places, stepped_from, num_inner, width,
    HAS_START: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """silu(W0 x) * (W2 x)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    slot = tl.load(rows + row).to(tl.int64)
    stepped = tl.load(places + row) >= stepped_from
    gate_E = tl.zeros((BLOCK_E,), dtype=tl.float32)
    value_E = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_K = tl.load(x + (row * num_heads + head) * width + k, mask=k < width, other=0.0)
        mask = (e < num_inner)[:, None] & (k < width)[None, :]
        cell = (head * num_inner + e[:, None]) * width + k[None, :]
        mine = slot * num_heads * num_inner * width + cell
        own_mask = mask
        if HAS_START:
            own_mask = mask & stepped
        w0_EK = tl.load(own_w0 + mine, mask=own_mask, other=0.0)
        w2_EK = tl.load(own_w2 + mine, mask=own_mask, other=0.0)
        if HAS_START:
            start_mask = mask & (stepped == 0)
            w0_EK += tl.load(start_w0 + cell, mask=start_mask, other=0.0)
            w2_EK += tl.load(start_w2 + cell, mask=start_mask, other=0.0)
        gate_E += tl.sum(w0_EK * x_K[None, :], axis=1)
        value_E += tl.sum(w2_EK * x_K[None, :], axis=1)
    inner_E = gate_E / (1 + tl.exp(-gate_E)) * value_E
    tl.store(inner + (row * num_heads + head) * num_inner + e, inner_E, mask=e < num_inner)


@triton.jit
def _output(
    inner, own_w1, start_w1, out, rows, places, stepped_from, num_inner, width,
    HAS_START: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """W1 of the inner values."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = tl.load(rows + row).to(tl.int64)
    stepped = tl.load(places + row) >= stepped_from
    out_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, num_inner, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inner_E = tl.load(
            inner + (row * num_heads + head) * num_inner + e, mask=e < num_inner, other=0.0
        )
        mask = (k < width)[:, None] & (e < num_inner)[None, :]
        cell = (head * width + k[:, None]) * num_inner + e[None, :]
        own_mask = mask
        if HAS_START:
            own_mask = mask & stepped
        w1_KE = tl.load(
            own_w1 + slot * num_heads * num_inner * width + cell, mask=own_mask, other=0.0
        )
        if HAS_START:
            w1_KE += tl.load(start_w1 + cell, mask=mask & (stepped == 0), other=0.0)
        out_K += tl.sum(w1_KE * inner_E[None, :], axis=1)
    tl.store(out + (row * num_heads + head) * width + k, out_K, mask=k < width)


@torch.no_grad()
def attend_ring(q_BHK: Tensor, k_NLD: Tensor, v_NLD: Tensor, window: int, at: StepRows) -> Tensor:
    """`imprint.models.kernels.lact_step.attend_ring` in one launch."""
    batch, heads, width = q_BHK.shape
    assert k_NLD.is_contiguous()
    assert v_NLD.is_contiguous()
    block_k = max(16, triton.next_power_of_2(width))
    size = k_NLD.shape[1]
    out = torch.empty(q_BHK.shape, dtype=k_NLD.dtype, device=q_BHK.device)
    _attend[(batch, heads)](
        q_BHK.to(k_NLD.dtype).contiguous(),
        k_NLD,
        v_NLD,
        out,
        at.rows_B,
        at.places_B,
        width**-0.5,
        WINDOW=window,
        SIZE=size,
        WIDTH=width,
        BLOCK_L=min(max(16, _RING_TILE // block_k), max(16, triton.next_power_of_2(size))),
        BLOCK_K=block_k,
    )
    return out


@torch.no_grad()
def read_rows(
    weights: FastWeights,
    initial: FastWeights | None,
    stepped_from: int,
    q_BHK: Tensor,
    at: StepRows,
) -> Tensor:
    """`imprint.models.kernels.lact_step.read_rows` in two launches."""
    batch, heads, width = q_BHK.shape
    num_inner = weights.w0.shape[2]
    assert all(w.is_contiguous() and w.dtype == torch.float32 for w in weights)
    q_BHK = q_BHK.float().contiguous()
    inner = q_BHK.new_empty(batch, heads, num_inner)
    out = torch.empty_like(q_BHK)
    start = None if initial is None else FastWeights(*(w.float().contiguous() for w in initial))
    row_arguments = at.rows_B, at.places_B, stepped_from, num_inner, width

    def blocks(outer: int, summed: int) -> tuple[int, int]:
        summed = min(128, max(16, triton.next_power_of_2(summed)))
        return min(_WEIGHT_TILE // summed, max(16, triton.next_power_of_2(outer))), summed

    block_e, block_k = blocks(num_inner, width)
    _inner[(batch, heads, triton.cdiv(num_inner, block_e))](
        q_BHK,
        weights.w0,
        weights.w2,
        None if start is None else start.w0,
        None if start is None else start.w2,
        inner,
        *row_arguments,
        HAS_START=start is not None,
        BLOCK_E=block_e,
        BLOCK_K=block_k,
        num_warps=8,  # two matrices in registers: with fewer they do not fit
    )
    block_k, block_e = blocks(width, num_inner)
    _output[(batch, heads, triton.cdiv(width, block_k))](
        inner,
        weights.w1,
        None if start is None else start.w1,
        out,
        *row_arguments,
        HAS_START=start is not None,
        BLOCK_K=block_k,
        BLOCK_E=block_e,
    )
    return out
