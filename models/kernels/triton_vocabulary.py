"""Triton kernels of the vocabulary distribution, from hidden states, without its [T, V] logits.

Launchers only: they check nothing and know no autograd; `kernels/vocabulary.py` does, and holds the
twin. Logits are summed in float32 and never rounded to a narrower type. The sums are online, as in
Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867. Compiles
for GPUs, but has run in Triton's interpreter only.
Shapes: T = tokens, D = model width, V = vocabulary, S = parts of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 256  # about two per multiprocessor of a large GPU
_BLOCK_T, _BLOCK_V = 64, 128
_INPUT_BYTES = 128  # of a row or word at once: two programs fit into a multiprocessor's memory


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is known of each token's distribution; natural logarithms, float32."""

    top_T: Tensor
    """The largest logit, divided by the temperature, as all logits are."""
    log_mass_T: Tensor
    """log sum exp(logit - top): a logit's log-probability is (logit - top) - log_mass."""
    entropy_T: Tensor
    chosen_T: Tensor
    """The logit of the asked token; zero where none was asked."""
    best_T: Tensor
    """The most likely token, int64; the first of equals."""


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, t, v, num_rows, vocabulary, width,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden weight^T for the rows `t` and the tokens `v`: [T, V] of one tile, float32."""
    acc_TV = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        hidden_TD = tl.load(
            hidden_ptr + t.to(tl.int64)[:, None] * width + d[None, :],
            mask=(t < num_rows)[:, None] & (d < width)[None, :],
            other=0.0,
        )
        weight_VD = tl.load(
            weight_ptr + v.to(tl.int64)[:, None] * width + d[None, :],
            mask=(v < vocabulary)[:, None] & (d < width)[None, :],
            other=0.0,
        )
        acc_TV = tl.dot(hidden_TD, tl.trans(weight_VD), acc_TV, input_precision="tf32x3")
    return acc_TV


@triton.jit
def _statistics(
    hidden_ptr, weight_ptr, targets_ptr, top_ptr, sum_ptr, moment_ptr, chosen_ptr, best_ptr,
    num_rows, num_tiles, vocabulary, width, part, temperature,
    HAS_TARGETS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Over one part of the vocabulary, with z the logits and m their maximum: m, sum exp(z - m),
    sum exp(z - m) (z - m), the asked token's logit if it is in the part, and where m is."""
    split = tl.program_id(0) // num_tiles
    t = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = t < num_rows
    target_T = tl.full((BLOCK_T,), -1, dtype=tl.int64)
    if HAS_TARGETS:
        target_T = tl.load(targets_ptr + t, mask=inside_T, other=-1)
    top_T = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    sum_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    moment_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    chosen_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    best_T = tl.zeros((BLOCK_T,), dtype=tl.int32)
    first = split * part
    for start in range(0, part, BLOCK_V):
        v = first + start + tl.arange(0, BLOCK_V)
        z_TV = _logits(
            hidden_ptr, weight_ptr, t, v, num_rows, vocabulary, width, BLOCK_T, BLOCK_V, BLOCK_D
        )
        known_TV = ((v < vocabulary) & (v < first + part))[None, :]
        z_TV = tl.where(known_TV, z_TV / temperature, float("-inf"))
        chosen_T += tl.sum(tl.where(known_TV & (v[None, :] == target_T[:, None]), z_TV, 0.0), 1)
        block_top_T = tl.max(z_TV, 1)
        best_T = tl.where(block_top_T > top_T, first + start + tl.argmax(z_TV, 1), best_T)
        new_top_T = tl.maximum(top_T, block_top_T)
        # nothing has been summed up while the maximum is still -inf, and NaN is not its maximum
        shift_T = tl.where(new_top_T == float("-inf"), 0.0, new_top_T)
        fall_T = tl.where(top_T == float("-inf"), 0.0, top_T - shift_T)
        gap_TV = tl.where(known_TV, z_TV - shift_T[:, None], 0.0)
        mass_TV = tl.where(known_TV, tl.exp(gap_TV), 0.0)
        moment_T = tl.exp(fall_T) * (moment_T + sum_T * fall_T) + tl.sum(mass_TV * gap_TV, 1)
        sum_T = tl.exp(fall_T) * sum_T + tl.sum(mass_TV, 1)
        top_T = new_top_T
    place_T = split * num_rows + t
    tl.store(top_ptr + place_T, top_T, mask=inside_T)
    tl.store(sum_ptr + place_T, sum_T, mask=inside_T)
    tl.store(moment_ptr + place_T, moment_T, mask=inside_T)
    tl.store(chosen_ptr + place_T, chosen_T, mask=inside_T)
    tl.store(best_ptr + place_T, best_T, mask=inside_T)


@triton.jit
def _logit_grads(
    hidden_ptr, weight_ptr, targets_ptr, top_ptr, log_mass_ptr, grad_ptr, out_ptr,
    num_rows, num_tiles, vocabulary, width, temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t, v] = grad[t] / temperature * ([v is the asked token] - probability of v)."""
    t = (tl.program_id(0) % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = (tl.program_id(0) // num_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_T = t < num_rows
    z_TV = _logits(
        hidden_ptr, weight_ptr, t, v, num_rows, vocabulary, width, BLOCK_T, BLOCK_V, BLOCK_D
    )
    top_T = tl.load(top_ptr + t, mask=inside_T, other=0.0)
    log_mass_T = tl.load(log_mass_ptr + t, mask=inside_T, other=0.0)
    grad_T = tl.load(grad_ptr + t, mask=inside_T, other=0.0).to(tl.float32)
    target_T = tl.load(targets_ptr + t, mask=inside_T, other=-1)
    hit_TV = tl.where(v[None, :] == target_T[:, None], 1.0, 0.0)
    out_TV = hit_TV - tl.exp(z_TV / temperature - top_T[:, None] - log_mass_T[:, None])
    out_TV *= grad_T[:, None] / temperature
    tl.store(
        out_ptr + t.to(tl.int64)[:, None] * vocabulary + v[None, :],
        out_TV.to(out_ptr.dtype.element_ty),
        mask=inside_T[:, None] & (v < vocabulary)[None, :],
    )


def statistics(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor | None, temperature: float
) -> Statistics:
    """The distribution after each hidden state; T >= 1, both inputs contiguous, of one dtype."""
    (num_rows, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    tiles = triton.cdiv(num_rows, _BLOCK_T)
    wanted = max(1, _PROGRAMS // tiles)
    part = triton.cdiv(triton.cdiv(vocabulary, wanted), _BLOCK_V) * _BLOCK_V
    parts = triton.cdiv(vocabulary, part)
    top_ST, sum_ST, moment_ST, chosen_ST = torch.empty(
        (4, parts, num_rows), dtype=torch.float32, device=hidden_TD.device
    )
    best_ST = torch.empty((parts, num_rows), dtype=torch.int32, device=hidden_TD.device)
    _statistics[(tiles * parts,)](
        hidden_TD, weight_VD, targets_T, top_ST, sum_ST, moment_ST, chosen_ST, best_ST,
        num_rows, tiles, vocabulary, width, part, float(temperature),
        HAS_TARGETS=targets_T is not None,
        BLOCK_T=_BLOCK_T, BLOCK_V=_BLOCK_V, BLOCK_D=_INPUT_BYTES // hidden_TD.element_size(),
    )  # fmt: skip
    top_T = top_ST.amax(0)
    fall_ST = top_ST - top_T
    mass_ST = fall_ST.exp() * sum_ST
    mass_T = mass_ST.sum(0)
    moment_T = (fall_ST.exp() * moment_ST + mass_ST * fall_ST).sum(0)
    first_ST = torch.where(top_ST == top_T, best_ST.long(), vocabulary - 1)
    return Statistics(
        top_T=top_T,
        log_mass_T=mass_T.log(),
        # H = log sum exp(z - m) - E[z - m]
        entropy_T=mass_T.log() - moment_T / mass_T,
        chosen_T=chosen_ST.sum(0),
        best_T=first_ST.amin(0),
    )


def logit_grads(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    top_T: Tensor,
    log_mass_T: Tensor,
    grad_T: Tensor,
    temperature: float,
) -> Tensor:
    """The gradient of sum(grad * log-probability of the targets) in the logits: [T, V]."""
    (num_rows, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
    out_TV = torch.empty((num_rows, vocabulary), dtype=hidden_TD.dtype, device=hidden_TD.device)
    tiles = triton.cdiv(num_rows, _BLOCK_T)
    _logit_grads[(tiles * triton.cdiv(vocabulary, _BLOCK_V),)](
        hidden_TD, weight_VD, targets_T, top_T, log_mass_T, grad_T, out_TV,
        num_rows, tiles, vocabulary, width, float(temperature),
        BLOCK_T=_BLOCK_T, BLOCK_V=_BLOCK_V, BLOCK_D=_INPUT_BYTES // hidden_TD.element_size(),
    )  # fmt: skip
    return out_TV
