"""Triton kernels of per-document deltas: shrink, expand, and the products of their gradients.

Launchers only: they check nothing and know no autograd; `kernels/lora.py` does, and holds the twin.
Each segment of rows takes one delta, so deltas never mix; padding at its end is skipped. Sums are
made in a fixed order, without atomics. Products of float32 use TF32x3, which keeps float32's
accuracy on tensor cores. Compiles for GPUs, but has run in Triton's
interpreter only.
Shapes: S = segments, T = rows of a segment, Q = deltas, R = rank, I / O = input / output width,
P = parts of the summed axis.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 512  # inputs that one program of `shrink` sums up; fixed, so that no batch changes a sum
_ROWS_PER_PART = 1024  # rows that one program of `outer` sums up


@triton.jit
def _shrink(
    x_ptr, w_ptr, h_ptr, lengths_ptr,
    num_rows, num_tiles, share, width, rank, part, h_stride_p,
    w_stride_q, w_stride_r, w_stride_i,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h[p, s, t, r] = sum over the inputs i of part p of x[s, t, i] * w[q(s), r, i]."""
    segment = (tl.program_id(0) // num_tiles).to(tl.int64)
    t = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    q = segment // share
    length = num_rows
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + segment).to(tl.int32)
    live_T = t < length
    acc_TR = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    first = tl.program_id(1) * part
    for start in range(0, part, BLOCK_I):
        i = first + start + tl.arange(0, BLOCK_I)
        x_TI = tl.load(
            x_ptr + (segment * num_rows + t[:, None]) * width + i[None, :],
            mask=live_T[:, None] & (i < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        w_RI = tl.load(
            w_ptr + q * w_stride_q + r[:, None] * w_stride_r + i[None, :] * w_stride_i,
            mask=(r < rank)[:, None] & (i < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        if BLOCK_T == 1:
            acc_TR += tl.sum(x_TI * w_RI, axis=1)[None, :]
        else:
            acc_TR = tl.dot(x_TI, tl.trans(w_RI), acc_TR, input_precision="tf32x3")
    tl.store(
        h_ptr
        + tl.program_id(1) * h_stride_p
        + (segment * num_rows + t[:, None]) * rank
        + r[None, :],
        acc_TR,
        mask=(t < num_rows)[:, None] & (r < rank)[None, :],
    )


@triton.jit
def _expand(
    h_ptr, w_ptr, base_ptr, y_ptr, lengths_ptr,
    num_rows, num_tiles, share, rank, width, h_stride_p,
    w_stride_q, w_stride_o, w_stride_r,
    PARTS: tl.constexpr, HAS_BASE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y[s, t, o] = base[s, t, o] + sum over r of (sum over p of h[p, s, t, r]) * w[q(s), o, r]."""
    segment = (tl.program_id(0) // num_tiles).to(tl.int64)
    t = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    q = segment // share
    length = num_rows
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + segment).to(tl.int32)
    live_T = t < length
    h_TR = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for p in tl.static_range(PARTS):
        h_TR += tl.load(
            h_ptr + p * h_stride_p + (segment * num_rows + t[:, None]) * rank + r[None, :],
            mask=live_T[:, None] & (r < rank)[None, :],
            other=0.0,
        )
    w_OR = tl.load(
        w_ptr + q * w_stride_q + o[:, None] * w_stride_o + r[None, :] * w_stride_r,
        mask=(o < width)[:, None] & (r < rank)[None, :],
        other=0.0,
    ).to(tl.float32)
    if BLOCK_T == 1:
        y_TO = tl.sum(h_TR * w_OR, axis=1)[None, :]
    else:
        y_TO = tl.dot(h_TR, tl.trans(w_OR), input_precision="tf32x3")
    place_TO = (segment * num_rows + t[:, None]) * width + o[None, :]
    inside_TO = (t < num_rows)[:, None] & (o < width)[None, :]
    y_TO = tl.where(live_T[:, None], y_TO, 0.0)  # a weight may be infinite
    if HAS_BASE:
        y_TO += tl.load(base_ptr + place_TO, mask=inside_TO, other=0.0).to(tl.float32)
    tl.store(y_ptr + place_TO, y_TO.to(y_ptr.dtype.element_ty), mask=inside_TO)


@triton.jit
def _outer(
    left_ptr, wide_ptr, out_ptr,
    num_rows, rank, width, part, left_stride_p, out_stride_p,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out[p, s, r, i] = sum over the rows t of part p of left[s, t, r] * wide[s, t, i]."""
    segment = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.arange(0, BLOCK_R)
    first = tl.program_id(2) * part
    acc_RI = tl.zeros((BLOCK_R, BLOCK_I), dtype=tl.float32)
    for start in range(0, part, BLOCK_T):
        t = first + start + tl.arange(0, BLOCK_T)
        left_TR = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for p in tl.static_range(PARTS):
            left_TR += tl.load(
                left_ptr
                + p * left_stride_p
                + (segment * num_rows + t[:, None]) * rank
                + r[None, :],
                mask=(t < num_rows)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
        wide_TI = tl.load(
            wide_ptr + (segment * num_rows + t[:, None]) * width + i[None, :],
            mask=(t < num_rows)[:, None] & (i < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        acc_RI = tl.dot(tl.trans(left_TR), wide_TI, acc_RI, input_precision="tf32x3")
    tl.store(
        out_ptr
        + tl.program_id(2) * out_stride_p
        + (segment * rank + r[:, None]) * width
        + i[None, :],
        acc_RI,
        mask=(r < rank)[:, None] & (i < width)[None, :],
    )


def shrink(x_STI: Tensor, w_QRI: Tensor, lengths_S: Tensor | None = None) -> Tensor:
    """x w^T per segment, in parts that are still to be summed: [P, S, T, R], float32.

    `w_QRI` may have any strides. Each delta serves S / Q segments in order. Of segment s the first
    `lengths_S[s]` rows count; the others, which are not looked at, give zeros.
    """
    (segments, num_rows, width), rank = x_STI.shape, w_QRI.shape[1]
    x_STI = x_STI.contiguous()
    parts = triton.cdiv(width, _PART)
    h_PSTR = torch.empty(
        (parts, segments, num_rows, rank), dtype=torch.float32, device=x_STI.device
    )
    block = _block_rows(num_rows)
    tiles = triton.cdiv(num_rows, block)
    _shrink[(segments * tiles, parts)](
        x_STI, w_QRI, h_PSTR, lengths_S,
        num_rows, tiles, segments // w_QRI.shape[0], width, rank, _PART, h_PSTR.stride(0),
        *w_QRI.stride(),
        HAS_LENGTHS=lengths_S is not None,
        BLOCK_T=block, BLOCK_R=_block_rank(rank), BLOCK_I=64,
    )  # fmt: skip
    return h_PSTR


def expand(
    h_PSTR: Tensor,
    w_QOR: Tensor,
    dtype: torch.dtype,
    *,
    base_STO: Tensor | None = None,
    lengths_S: Tensor | None = None,
) -> Tensor:
    """`base_STO` (or zeros) plus h w^T per segment, summed over the parts of h: [S, T, O], `dtype`.

    `w_QOR` may have any strides. Deltas and `lengths_S` as in `shrink`: beyond its length, a
    segment is its base.
    """
    (parts, segments, num_rows, rank), width = h_PSTR.shape, w_QOR.shape[1]
    base_STO = None if base_STO is None else base_STO.contiguous()
    y_STO = torch.empty((segments, num_rows, width), dtype=dtype, device=h_PSTR.device)
    block = _block_rows(num_rows)
    tiles = triton.cdiv(num_rows, block)
    _expand[(segments * tiles, triton.cdiv(width, 128))](
        h_PSTR, w_QOR, base_STO, y_STO, lengths_S,
        num_rows, tiles, segments // w_QOR.shape[0], rank, width, h_PSTR.stride(0),
        *w_QOR.stride(),
        PARTS=parts, HAS_BASE=base_STO is not None, HAS_LENGTHS=lengths_S is not None,
        BLOCK_T=block, BLOCK_R=_block_rank(rank), BLOCK_O=128,
    )  # fmt: skip
    return y_STO


def outer(left_PSTR: Tensor, wide_STI: Tensor) -> Tensor:
    """left^T wide per segment, over its rows, `left` summed over its parts: [S, R, I], float32."""
    (parts, segments, num_rows, rank), width = left_PSTR.shape, wide_STI.shape[-1]
    wide_STI = wide_STI.contiguous()
    row_parts = triton.cdiv(num_rows, _ROWS_PER_PART)
    out_PSRI = torch.empty(
        (row_parts, segments, rank, width), dtype=torch.float32, device=wide_STI.device
    )
    part = min(_ROWS_PER_PART, triton.next_power_of_2(num_rows))
    _outer[(segments, triton.cdiv(width, 64), row_parts)](
        left_PSTR, wide_STI, out_PSRI,
        num_rows, rank, width, part, left_PSTR.stride(0), out_PSRI.stride(0),
        PARTS=parts, BLOCK_T=32, BLOCK_R=_block_rank(rank), BLOCK_I=64,
    )  # fmt: skip
    return out_PSRI.sum(0)


def _block_rows(num_rows: int) -> int:
    """Rows of a tile: one for decoding, else what a tensor-core product takes at least, or more."""
    if num_rows == 1:
        return 1
    return 64 if num_rows >= 64 else 16


def _block_rank(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))
