"""Causal attention over a sliding window, and the rotary positions that go with it.

Keys and values of earlier tokens come from a state; knows nothing of how it is kept.
Shapes: B = batch, P = rows of earlier tokens (P divides B), H = heads, T = tokens, W = window,
L = W - 1 earlier tokens, K = width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 512
"""Queries that go through attention together, if a read has so many."""


class Rotation(NamedTuple):
    """Turns by the angles position * theta^(-2i / width), i in 0 ... width / 2 - 1 (Su et al.,
    RoFormer, arXiv 2104.09864)."""

    cos: Tensor
    """[B, T, 1, width / 2]"""
    sin: Tensor
    """[B, T, 1, width / 2]"""

    @classmethod
    def of(cls, positions_BT: Tensor, width: int, theta: float, dtype: torch.dtype) -> Self:
        """Those of tokens at the given positions."""
        exponents = torch.arange(0, width, 2, device=positions_BT.device, dtype=dtype) / width
        angles = positions_BT[..., None, None].to(dtype) * (1 / theta**exponents)
        return cls(angles.cos(), angles.sin())

    def back(self) -> Self:
        """The other way."""
        return self._replace(sin=-self.sin)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x_i, x_{i + K/2}).

    The result has the type of x, the computation that of the rotation.
    """
    cos, sin = rotation
    first, second = x_BTHK.to(cos.dtype).chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return turned.to(x_BTHK.dtype)


def window_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, window: int, num_before: Sequence[int]
) -> Tensor:
    """Each of T tokens attends to itself and the W - 1 tokens before it: [B, H, T, K].

    The keys are those of L = W - 1 earlier tokens, then of the T tokens. Of the earlier ones, row
    i has only the last `num_before[i]`; what stands before them is not looked at.
    """
    num_tokens = q_BHTK.shape[2]
    size = min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK)
    outs = []
    for first in range(0, num_tokens, size):
        last = min(first + size, num_tokens)
        mask = _band(last - first, window, q_BHTK.device)
        missing = [max(window - 1 - num - first, 0) for num in num_before]
        if any(missing):
            there = _from(missing, mask.shape[-1], q_BHTK.device)
            mask = there[:, None, None] & mask
        keys = slice(first, last + window - 1)
        outs.append(
            F.scaled_dot_product_attention(
                q_BHTK[:, :, first:last],
                k_BHSK[:, :, keys],
                v_BHSK[:, :, keys],
                attn_mask=None if last - first == 1 and not any(missing) else mask,
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def shared_window_attention(
    q_BHTK: Tensor,
    before_kv: tuple[Tensor, Tensor],
    own_kv: tuple[Tensor, Tensor],
    num_before: Sequence[int],
) -> Tensor:
    """`window_attention` where each of P rows of earlier tokens serves B / P rows, uncopied.

    `before_kv`: keys and values [P, H, L, K] of the earlier tokens; `own_kv`: [B, H, T, K] of the
    new ones. Meant for short reads: a row also computes its neighbours' scores, and masks them.
    """
    batch, heads, num_tokens, width = q_BHTK.shape
    (before_k, before_v), (k_BHTK, v_BHTK) = before_kv, own_kv
    num_rows, keep = before_k.shape[0], before_k.shape[2]

    def fold(x_BHTK: Tensor) -> Tensor:  # [P, H, G * T, K], G = B / P
        x = x_BHTK.reshape(num_rows, -1, heads, num_tokens, width)
        return x.transpose(1, 2).flatten(2, 3)

    device = q_BHTK.device
    group = batch // num_rows
    band = _band(num_tokens, keep + 1, device)
    earlier = band[:, :keep].repeat(group, 1)
    row = torch.arange(group, device=device).repeat_interleave(num_tokens)
    own = (row[:, None] == row) & band[:, keep:].repeat(group, group)
    missing = [keep - min(num, keep) for num in num_before]
    there = _from(missing, keep, device)[:, None]
    mask = torch.cat((there & earlier, own.expand(num_rows, -1, -1)), -1)
    out = F.scaled_dot_product_attention(
        fold(q_BHTK),
        torch.cat((before_k, fold(k_BHTK)), 2),
        torch.cat((before_v, fold(v_BHTK)), 2),
        attn_mask=mask[:, None],
    )
    out = out.view(num_rows, heads, group, num_tokens, width).transpose(1, 2)
    return out.reshape(batch, heads, num_tokens, width)


def _band(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """Which of L + T keys each of T queries may look at: [T, L + T]."""
    query = torch.arange(num_tokens, device=device)
    key = torch.arange(num_tokens + window - 1, device=device)
    distance = key - query[:, None]
    return (distance >= 0) & (distance < window)


def _from(starts: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Row i is true from place `starts[i]` on: [rows, size]."""
    start = torch.tensor(starts, device=device)
    return torch.arange(size, device=device) >= start[:, None]
