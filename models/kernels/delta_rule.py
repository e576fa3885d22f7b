"""The delta rule in plain torch: a chunkwise form for reading and a one-token form for decoding.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,      o_t = scale * S_t^T q_t

(Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
arXiv 2406.06484). Both forms are differentiable in every argument, the incoming state included, and
compute in float32 at least, whatever the ambient precision.

Shapes: B = batch, H = heads, T = tokens, K = key width, V = value width, C = tokens of a chunk,
N = number of chunks, M = B * H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.kernels.chunks import (
    WHOLE_VECTORS,
    Outputs,
    blocks,
    chunk_size_for,
    needs_grad,
    own_state,
    to_chunks,
)

_BASE = 16  # size of the diagonal blocks that are inverted by forward substitution


class _UnitLowerInverse(torch.autograd.Function):
    """(I + L)^-1 for strictly lower triangular L [M, C, C].

    Blocks of 16 by forward substitution, then merged pairwise (X21 = -X22 L21 X11). The doubling of
    the Neumann series would need fewer launches but overflows when keys of a chunk repeat.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, lower_MCC: Tensor) -> Tensor:
        inverse_MCC = _invert_unit_lower(lower_MCC)
        ctx.save_for_backward(inverse_MCC)
        return inverse_MCC

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_MCC: Tensor) -> Tensor:
        inverse_MCC: Tensor = ctx.saved_tensors[0]  # type: ignore[attr-defined]
        transposed_MCC = inverse_MCC.mT
        return -(transposed_MCC @ (grad_MCC @ transposed_MCC)).tril(-1)


def _invert_unit_lower(lower_MCC: Tensor) -> Tensor:
    num, size = lower_MCC.shape[0], lower_MCC.shape[-1]
    num_blocks = size // _BASE
    inverse_MCC = torch.zeros_like(lower_MCC)
    blocks = lower_MCC.view(num, num_blocks, _BASE, num_blocks, _BASE).diagonal(dim1=1, dim2=3)
    # block index innermost: every operation of the substitution is then contiguous
    low = blocks.permute(1, 2, 0, 3).reshape(_BASE, _BASE, num * num_blocks)
    # a CPU sums what fills no vector in another order: a row would depend on how many there are
    minus = -F.pad(low, (0, -num * num_blocks % WHOLE_VECTORS))
    inv = torch.zeros_like(minus)
    inv.diagonal(dim1=0, dim2=1).fill_(1)
    for i in range(1, _BASE):
        torch.sum(minus[i, :i, None] * inv[:i, :i], 0, out=inv[i, :i])
    target = inverse_MCC.view(num, num_blocks, _BASE, num_blocks, _BASE).diagonal(dim1=1, dim2=3)
    inv = inv[:, :, : num * num_blocks].view(_BASE, _BASE, num, num_blocks)
    target.copy_(inv.permute(2, 0, 1, 3))
    width = _BASE
    while width < size:
        for j in range(0, size, 2 * width):
            mid, end = j + width, j + 2 * width
            lower_left = torch.bmm(lower_MCC[:, mid:end, j:mid], inverse_MCC[:, j:mid, j:mid])
            upper_left = torch.bmm(inverse_MCC[:, mid:end, mid:end], lower_left)
            torch.neg(upper_left, out=inverse_MCC[:, mid:end, j:mid])
        width *= 2
    return inverse_MCC


def unit_lower_inverse(lower_MCC: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L, differentiable; C is a multiple of 16."""
    inverse: Tensor = _UnitLowerInverse.apply(lower_MCC)  # type: ignore[no-untyped-call]
    return inverse


def chunk_delta_rule(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    beta_BHT: Tensor,
    state_BHKV: Tensor,
    *,
    chunk_size: int | None = None,
    stops: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read T >= 1 tokens. q and k are already normalised; the read-out is scaled by K^-1/2.

    Per chunk, with A = tril(diag(beta) K K^T, -1) and X = (I + A)^-1 diag(beta) (the UT transform):
    U = X V, W = X K, V' = U - W S, O = scale (Q S + tril(Q K^T) V'), S <- S + K^T V'.
    Only the last line and W S are sequential. Returns (o [B, H, T, V], final state [B, H, K, V]).
    `chunk_size` must be a multiple of 16. With `stops` (one row only, ascending token counts) there
    is a state for each of them, [P, H, K, V], instead of the final one.
    """
    batch, heads, _, key_dim = q_BHTK.shape
    size = chunk_size or chunk_size_for(q_BHTK.shape[2], key_dim)
    state_PHKV = state_BHKV.to(torch.promote_types(state_BHKV.dtype, torch.float32))
    tokens = (q_BHTK, k_BHTK, v_BHTV, beta_BHT.unsqueeze(-1))
    shared = batch // state_PHKV.shape[0]
    if shared > 1 and q_BHTK.shape[2] <= size:
        return _one_chunk_of_shared_states(tokens, size, state_PHKV)
    in_place = not needs_grad(*tokens, state_PHKV)
    state = own_state(state_PHKV, shared, in_place=in_place)
    added = Tensor.baddbmm_ if in_place else torch.baddbmm
    outputs = Outputs(v_BHTV, state.dtype, in_place=in_place)
    stopped, num_read = [], 0
    for block in blocks(tokens, size):
        q, k, u, w, attention = _within_chunks(block, size, state.dtype, in_place=in_place)
        room = torch.empty_like(u)
        values, reads = [], []
        # unbind, not indexing: the backward of indexing is quadratic in the number of chunks
        pieces = zip(*(x.unbind() for x in (u, w, k.mT, q, room)), strict=True)
        for u_n, w_n, kt_n, q_n, room_n in pieces:
            value = added(u_n, w_n, state, alpha=-1)
            values.append(value)
            reads.append(added(room_n, q_n, state, beta=0))
            for stop in stops or ():
                if num_read < stop <= num_read + size:
                    read = stop - num_read
                    stopped.append(torch.baddbmm(state, kt_n[:, :, :read], value[:, :read]))
            state = added(state, kt_n, value)
            num_read += size
        if not in_place:
            room, u = torch.stack(reads), torch.stack(values)
        outputs.add(read_out(room, attention, u, key_dim**-0.5, in_place=in_place))
    if stops is not None:
        return outputs.joined(), torch.stack(stopped)
    return outputs.joined(), state.view(batch, heads, *state.shape[1:])


def _within_chunks(
    tokens: Sequence[Tensor], size: int, dtype: torch.dtype, *, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, U and W [N, M, C, D] and tril(Q K^T) [N M, C, C] of a block's chunks."""
    q, k, v, beta = (to_chunks(x, size, dtype) for x in tokens)
    q_, k_, v_, beta_ = (x.flatten(0, 1) for x in (q, k, v, beta))
    times = Tensor.mul_ if in_place else torch.mul
    # beta and scale go to small matrices: a pass over q, k or v costs about as much as a product
    written = times(torch.bmm(k_, k_.mT), beta_).tril_(-1)
    solve = times(unit_lower_inverse(written), beta_.mT)
    attention = torch.bmm(q_, k_.mT).tril_()
    u, w = torch.bmm(solve, v_), torch.bmm(solve, k_)
    return q, k, u.view_as(v), w.view_as(k), attention


def read_out(
    reads: Tensor, attention: Tensor, values: Tensor, scale: float, *, in_place: bool
) -> Tensor:
    """scale (reads + attention values): [N, M, C, V]; with `in_place` it overwrites `reads`."""
    parts = (reads.flatten(0, 1), attention, values.flatten(0, 1))
    added = Tensor.baddbmm_ if in_place else torch.baddbmm
    return added(*parts, alpha=scale, beta=scale).view_as(reads)


def _one_chunk_of_shared_states(
    tokens: Sequence[Tensor], size: int, state_PHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunk_delta_rule` of one chunk where each of P states serves several rows."""
    states, heads = state_PHKV.shape[:2]
    num_tokens = tokens[0].shape[2]
    q, k, u, w, attention = _within_chunks(tokens, size, state_PHKV.dtype, in_place=False)
    q, k, u, w = q[0], k[0], u[0], w[0]
    asked = torch.cat((w, q), 1).view(states, -1, heads, 2 * size, w.shape[-1])
    read = read_shared(asked, state_PHKV).flatten(0, 2)
    value = u - read[:, :size]
    scale = k.shape[-1] ** -0.5
    o = torch.baddbmm(read[:, size:], attention, value, alpha=scale, beta=scale)
    written = torch.bmm(k.mT, value).view(states, -1, *state_PHKV.shape[1:])
    new_state = written.add_(state_PHKV.unsqueeze(1)).flatten(0, 1)
    return o.view(-1, heads, size, o.shape[-1])[:, :, :num_tokens], new_state


def read_shared(asked_PGHCK: Tensor, state_PHKV: Tensor) -> Tensor:
    """asked @ state for G rows per state without copying the states: [P, G, H, C, V]."""
    states, rows, heads, size, _ = asked_PGHCK.shape
    folded = asked_PGHCK.transpose(1, 2).reshape(states * heads, rows * size, -1)
    read = torch.bmm(folded, state_PHKV.flatten(0, 1))
    return read.view(states, heads, rows, size, -1).transpose(1, 2)


def step_delta_rule(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, beta_BH: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Read one token. Returns (o [B, H, V], new state); the incoming state is left as it was."""
    batch, heads, key_dim = q_BHK.shape
    dtype = torch.promote_types(state_BHKV.dtype, torch.float32)
    shared = batch // state_BHKV.shape[0]
    state = (
        state_BHKV.to(dtype).repeat_interleave(shared, 0) if shared > 1 else state_BHKV.to(dtype)
    )
    state = state.flatten(0, 1)
    q, k, v = (x.to(dtype).flatten(0, 1) for x in (q_BHK, k_BHK, v_BHV))
    beta = beta_BH.to(dtype).reshape(-1, 1, 1)
    value = torch.baddbmm(v.unsqueeze(1), k.unsqueeze(1), state, alpha=-1) * beta
    state = torch.baddbmm(state, k.unsqueeze(2), value)
    o = torch.bmm(q.unsqueeze(1), state).squeeze(1) * key_dim**-0.5
    return o.view(batch, heads, -1), state.view(batch, heads, *state.shape[1:])
