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
    low = blocks.permute(1, 2, 0, 3).reshape(_BASE, _BASE, num * num_blocks).contiguous()
    inv = torch.zeros_like(low)
    inv[0, 0] = 1
    for i in range(1, _BASE):
        inv[i, :i] = -(low[i, :i].unsqueeze(1) * inv[:i, :i]).sum(0)
        inv[i, i] = 1
    target = inverse_MCC.view(num, num_blocks, _BASE, num_blocks, _BASE).diagonal(dim1=1, dim2=3)
    target.copy_(inv.view(_BASE, _BASE, num, num_blocks).permute(2, 0, 1, 3))
    width = _BASE
    while width < size:
        for j in range(0, size, 2 * width):
            mid, end = j + width, j + 2 * width
            lower_left = torch.bmm(lower_MCC[:, mid:end, j:mid], inverse_MCC[:, j:mid, j:mid])
            inverse_MCC[:, mid:end, j:mid] = -torch.bmm(
                inverse_MCC[:, mid:end, mid:end], lower_left
            )
        width *= 2
    return inverse_MCC


def unit_lower_inverse(lower_MNCC: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L, differentiable; C is a multiple of 16."""
    inverse: Tensor = _UnitLowerInverse.apply(lower_MNCC.flatten(0, 1))  # type: ignore[no-untyped-call]
    return inverse.view_as(lower_MNCC)


def chunk_size_for(num_tokens: int, head_dim: int) -> int:
    """Tokens of a chunk that are fastest on a CPU."""
    # measured on two cores: 32 is fastest up to 64-wide heads, 64 above
    largest = 32 if head_dim <= 64 else 64
    size = _BASE
    while size < min(num_tokens, largest):
        size *= 2
    return size


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
    batch, heads, num_tokens, key_dim = q_BHTK.shape
    size = chunk_size or chunk_size_for(num_tokens, key_dim)
    dtype = torch.promote_types(state_BHKV.dtype, torch.float32)
    pad = -num_tokens % size

    def chunks(x: Tensor) -> Tensor:
        # [B, H, T, D] -> [M, N, C, D]; zero tokens at the end write nothing
        x = F.pad(x.to(dtype), (0, 0, 0, pad)) if pad else x.to(dtype)
        return x.reshape(batch * heads, (num_tokens + pad) // size, size, x.shape[-1])

    q, k, v = chunks(q_BHTK), chunks(k_BHTK), chunks(v_BHTV)
    beta, scale = chunks(beta_BHT.unsqueeze(-1)), key_dim**-0.5
    # beta and scale go to small matrices: a pass over q, k or v costs about as much as a product
    solve = unit_lower_inverse(((k @ k.mT) * beta).tril(-1)) * beta.mT
    u, w = solve @ v, solve @ k
    attention = (q @ k.mT).tril()
    shared = batch // state_BHKV.shape[0]
    if shared > 1 and w.shape[1] == 1:
        return _one_chunk_of_shared_states(q, k, u, w, attention, state_BHKV.to(dtype), num_tokens)
    state = (
        state_BHKV.to(dtype).repeat_interleave(shared, 0) if shared > 1 else state_BHKV.to(dtype)
    )
    state = state.flatten(0, 1)
    new_values, reads, stopped = [], [], []
    # unbind, not indexing: the backward of indexing is quadratic in the number of chunks
    pieces = zip(u.unbind(1), w.unbind(1), k.mT.unbind(1), q.unbind(1), strict=True)
    for n, (u_n, w_n, kt_n, q_n) in enumerate(pieces):
        value = torch.baddbmm(u_n, w_n, state, alpha=-1)
        new_values.append(value)
        reads.append(torch.bmm(q_n, state))
        for stop in stops or ():
            if n * size < stop <= (n + 1) * size:
                read = stop - n * size
                stopped.append(torch.baddbmm(state, kt_n[:, :, :read], value[:, :read]))
        state = torch.baddbmm(state, kt_n, value)
    pairs = (torch.stack(reads, 1), attention, torch.stack(new_values, 1))
    o = torch.baddbmm(*(x.flatten(0, 1) for x in pairs), alpha=scale, beta=scale)
    o = o.reshape(batch, heads, num_tokens + pad, v.shape[-1])[:, :, :num_tokens]
    if stops is not None:
        return o, torch.stack(stopped)
    return o, state.view(batch, heads, *state.shape[1:])


def _one_chunk_of_shared_states(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor,
    attention: Tensor,
    state_PHKV: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`chunk_delta_rule` of one chunk [M, 1, C, D] where each of P states serves several rows."""
    states, heads = state_PHKV.shape[:2]
    size = q.shape[2]
    asked = torch.cat((w, q), 2).view(states, -1, heads, 2 * size, w.shape[-1])
    read = read_shared(asked, state_PHKV).flatten(0, 2)
    value = u[:, 0] - read[:, :size]
    scale = k.shape[-1] ** -0.5
    o = torch.baddbmm(read[:, size:], attention[:, 0], value, alpha=scale, beta=scale)
    written = torch.bmm(k[:, 0].mT, value).view(states, -1, *state_PHKV.shape[1:])
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
