"""Batched per-document deltas: base + B A x for many deltas at once, in plain torch or Triton.

Rows come in segments, and each segment takes one delta: one row each when decoding, a document's
tokens, padded at the end, when reading. B A x is computed in float32 at least, and gradients never
mix.
Shapes: S = segments, T = rows of a segment, Q = deltas, R = rank, I / O = input / output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imprint.models.kernels import uses_triton

_MAX_TRITON_RANK = 256  # a tile holds the whole rank; adapters have far smaller ones


def lora_side(x_STI: Tensor, a_QRI: Tensor, b_QOR: Tensor) -> Tensor:
    """B A x where segment s takes delta s (S = Q): [S, T, O] in the deltas' dtype. Plain torch."""
    return _shrunk(x_STI, a_QRI) @ b_QOR.mT


def lora_add(base_STO: Tensor, x_STI: Tensor, a_QRI: Tensor, b_QOR: Tensor) -> Tensor:
    """base + B A x in the dtype of `base_STO`, as `lora_side` has B A x. Plain torch."""
    if base_STO.dtype != a_QRI.dtype:
        return (base_STO + lora_side(x_STI, a_QRI, b_QOR)).to(base_STO.dtype)
    return torch.baddbmm(base_STO, _shrunk(x_STI, a_QRI), b_QOR.mT)


def _shrunk(x_STI: Tensor, a_QRI: Tensor) -> Tensor:
    """A x [S, T, R]."""
    x_STI = x_STI.to(a_QRI.dtype)
    if x_STI.shape[1] == 1:  # as products of A with a column, which reads A faster on a CPU
        return (a_QRI @ x_STI.mT).mT
    return x_STI @ a_QRI.mT


def runs_on_triton(x: Tensor, a_QRI: Tensor) -> bool:
    """Whether the Triton kernels serve these inputs."""
    return (
        a_QRI.dtype != torch.float64
        and a_QRI.shape[1] <= _MAX_TRITON_RANK
        and x.numel() > 0
        and uses_triton(x.device)
    )


def lora_add_triton(
    base_STO: Tensor | None,
    x_STI: Tensor,
    a_QRI: Tensor,
    b_QOR: Tensor,
    lengths_S: Tensor | None = None,
) -> Tensor:
    """base + B A x in the dtype of `base_STO`: [S, T, O]. Each delta serves S / Q segments.

    Differentiable in all four. Without a base it is `lora_side`, with one
    `(base + lora_side(x, a, b)).to(base.dtype)`. Rows of segment s from `lengths_S[s]` on are
    padding: nothing is added to them, and nothing comes back through B A x.
    """
    out: Tensor = _AddDelta.apply(base_STO, x_STI, a_QRI, b_QOR, lengths_S)  # type: ignore[no-untyped-call]
    return out


class _AddDelta(torch.autograd.Function):
    """base + B A x. What is kept: the inputs, and A x, which is R numbers a row."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        base_STO: Tensor | None,
        x_STI: Tensor,
        a_QRI: Tensor,
        b_QOR: Tensor,
        lengths_S: Tensor | None,
    ) -> Tensor:
        from imprint.models.kernels import triton_lora

        h_PSTR = triton_lora.shrink(x_STI, a_QRI, lengths_S)
        ctx.save_for_backward(x_STI, a_QRI, b_QOR, h_PSTR, lengths_S)  # type: ignore[arg-type]
        dtype = a_QRI.dtype if base_STO is None else base_STO.dtype
        return triton_lora.expand(h_PSTR, b_QOR, dtype, base_STO=base_STO, lengths_S=lengths_S)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_STO: Tensor
    ) -> tuple[Tensor | None, ...]:
        from imprint.models.kernels import triton_lora

        x_STI, a_QRI, b_QOR, h_PSTR, lengths_S = ctx.saved_tensors  # type: ignore[attr-defined]
        wants_base, wants_x, wants_a, wants_b, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_x = grad_a = grad_b = None
        if wants_x or wants_a:
            # d(A x) = B^T d(B A x), which is a shrink by B^T
            grad_h_PSTR = triton_lora.shrink(grad_STO, b_QOR.mT, lengths_S)
            if wants_x:
                grad_x = triton_lora.expand(grad_h_PSTR, a_QRI.mT, x_STI.dtype, lengths_S=lengths_S)
            if wants_a:
                grad_a = _outer(grad_h_PSTR, x_STI, len(a_QRI)).to(a_QRI.dtype)
        if wants_b:
            grad_b = _outer(h_PSTR, grad_STO, len(b_QOR)).mT.to(b_QOR.dtype)
        return grad_STO if wants_base else None, grad_x, grad_a, grad_b, None


def _outer(left_PSTR: Tensor, wide_STI: Tensor, num_deltas: int) -> Tensor:
    """left^T wide over all rows of each delta: [Q, R, I]. Padding is zeros in `left`."""
    from imprint.models.kernels import triton_lora

    parts, _, _, rank = left_PSTR.shape
    rows_of_delta = wide_STI.reshape(num_deltas, -1, wide_STI.shape[-1])
    return triton_lora.outer(left_PSTR.view(parts, num_deltas, -1, rank), rows_of_delta)
