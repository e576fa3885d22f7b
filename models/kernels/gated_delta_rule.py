"""The gated delta rule in plain torch: a chunkwise form for reading, a one-token form for decoding.

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T,      o_t = scale * S_t^T q_t

with a decay a_t = exp(g_t), g_t <= 0, per token and head (Yang et al., "Gated Delta Networks:
Improving Mamba2 with Delta Rule", arXiv 2412.06464). Both forms are differentiable in every
argument, the incoming state included, and compute in float32 at least. The decay is given as its
logarithm, so that any is exact, down to those that forget everything.

Shapes: B = batch, H = heads, T = tokens, K = key width, V = value width, C = tokens of a chunk,
N = number of chunks, M = B * H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.models.kernels.chunks import (
    Outputs,
    blocks,
    chunk_size_for,
    needs_grad,
    own_state,
    to_chunks,
)
from imprint.models.kernels.delta_rule import read_out, read_shared, unit_lower_inverse

_LOG2_E = 1 / math.log(2)


def chunk_gated_delta_rule(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    beta_BHT: Tensor,
    log_decay_BHT: Tensor,
    state_BHKV: Tensor,
    *,
    chunk_size: int | None = None,
    stops: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read T >= 1 tokens. q and k are already normalised; the read-out is scaled by K^-1/2.

    Per chunk, with G the running sum of g in it, D_ij = exp(G_i - G_j) for i >= j,
    A = tril(diag(beta) K K^T * D, -1) and X = (I + A)^-1 diag(beta): U = X V, W = X diag(e^G) K,
    V' = U - W S, O = scale (diag(e^G) Q S + (Q K^T * D) V') and
    S <- e^G_C S + (diag(e^(G_C - G)) K)^T V'. Returns (o [B, H, T, V], final state [B, H, K, V]).
    `chunk_size` must be a multiple of 16. With `stops` (one row only, ascending token counts) there
    is a state for each of them, [P, H, K, V], instead of the final one.
    """
    batch, heads, _, key_dim = q_BHTK.shape
    size = chunk_size or chunk_size_for(q_BHTK.shape[2], key_dim)
    state_PHKV = state_BHKV.to(torch.promote_types(state_BHKV.dtype, torch.float32))
    per_token = (beta_BHT.unsqueeze(-1), log_decay_BHT.unsqueeze(-1))
    tokens = (q_BHTK, k_BHTK, v_BHTV, *per_token)
    shared = batch // state_PHKV.shape[0]
    if shared > 1 and q_BHTK.shape[2] <= size:
        return _one_chunk_of_shared_states(tokens, size, state_PHKV)
    in_place = not needs_grad(*tokens, state_PHKV)
    state = own_state(state_PHKV, shared, in_place=in_place)
    outputs = Outputs(v_BHTV, state.dtype, in_place=in_place)
    stopped, num_read = [], 0
    for block in blocks(tokens, size):
        chunks = _within_chunks(block, size, state.dtype, in_place=in_place)
        inside = [stop - num_read for stop in stops or () if stop > num_read]
        reads, values, state, states = _walk(chunks, state, inside, in_place=in_place)
        stopped += states
        scale = key_dim**-0.5
        outputs.add(read_out(reads, chunks.attention, values, scale, in_place=in_place))
        num_read += block[0].shape[2]
    if stops is not None:
        return outputs.joined(), torch.stack(stopped)
    return outputs.joined(), state.view(batch, heads, *state.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunks:
    """What a block's chunks are without a state: [N, M, C, D], but for what is said."""

    q: Tensor
    k: Tensor
    k_end: Tensor
    """As they have decayed by the chunk's end."""
    u: Tensor
    w: Tensor
    attention: Tensor
    """[N M, C, C]; zero above the diagonal."""
    since: Tensor
    between: Tensor
    """As `_decays` returns them."""


def _within_chunks(
    tokens: Sequence[Tensor], size: int, dtype: torch.dtype, *, in_place: bool
) -> _Chunks:
    q, k, v, beta, log_decay = (to_chunks(x, size, dtype) for x in tokens)
    since, between = _decays(log_decay)
    q_, k_, v_, beta_, since_, between_ = (x.flatten(0, 1) for x in (q, k, v, beta, since, between))
    times = Tensor.mul_ if in_place else torch.mul
    # beta and scale go to small matrices: a pass over q, k or v costs about as much as a product
    written = times(times(torch.bmm(k_, k_.mT), between_), beta_).tril_(-1)
    solve = times(unit_lower_inverse(written), beta_.mT)
    u = torch.bmm(solve, v_)
    w = torch.bmm(times(solve, since_.mT), k_)
    attention = times(torch.bmm(q_, k_.mT), between_).tril_()
    return _Chunks(
        q=q,
        k=k,
        k_end=k * between[:, :, -1].unsqueeze(-1),
        u=u.view_as(v),
        w=w.view_as(k),
        attention=attention,
        since=since,
        between=between,
    )


def _decays(log_decay_NMC1: Tensor) -> tuple[Tensor, Tensor]:
    """Decay from a chunk's start through token i [N, M, C, 1], and from after j through i.

    The second, [N, M, C, C], is one on its diagonal, and means nothing above it.
    """
    # differences of sums: float64 keeps what they would cancel after a token that forgets all.
    # Powers of two, because a CPU takes them in a third of the time
    total = (log_decay_NMC1.double() * _LOG2_E).cumsum(2)
    gap = (total - total.mT).to(log_decay_NMC1.dtype)
    # above the diagonal the gap is positive, and its power may overflow
    between = gap.clamp_(max=0).exp2_()
    return total.to(log_decay_NMC1.dtype).exp2(), between


def _walk(
    chunks: _Chunks, state: Tensor, stops: Sequence[int], *, in_place: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The sequential part: what the state before each chunk answers, and the chunk's new values.

    Third, the state [M, K, V] after the last one; fourth, those at `stops`, counted from the first
    chunk, as far as they lie in these. With `in_place` it overwrites `state` and `chunks.u`.
    """
    size = chunks.q.shape[2]
    added = Tensor.baddbmm_ if in_place else torch.baddbmm
    times = Tensor.mul_ if in_place else torch.mul
    room = torch.empty_like(chunks.u)
    values, reads, stopped = [], [], []
    # unbind, not indexing: the backward of indexing is quadratic in the number of chunks
    parts = (chunks.q, chunks.k, chunks.k_end, chunks.u, chunks.w)
    decays = (chunks.since, chunks.between)
    pieces = zip(*(x.unbind() for x in (*parts, *decays, room)), strict=True)
    for n, (q_n, k_n, k_end_n, u_n, w_n, since_n, between_n, room_n) in enumerate(pieces):
        value = added(u_n, w_n, state, alpha=-1)
        values.append(value)
        reads.append(added(room_n, q_n, state, beta=0))
        for stop in stops:
            if n * size < stop <= (n + 1) * size:
                num = stop - n * size
                kept = state * since_n[:, num - 1 : num]
                decayed = k_n[:, :num] * between_n[:, num - 1, :num].unsqueeze(-1)
                stopped.append(torch.baddbmm(kept, decayed.mT, value[:, :num]))
        kept = times(state, since_n[:, -1:])
        state = added(kept, k_end_n.mT, value)
    if in_place:
        return room.mul_(chunks.since), chunks.u, state, stopped
    return torch.stack(reads) * chunks.since, torch.stack(values), state, stopped


def _one_chunk_of_shared_states(
    tokens: Sequence[Tensor], size: int, state_PHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` of one chunk where each of P states serves several rows."""
    states, heads = state_PHKV.shape[:2]
    num_tokens = tokens[0].shape[2]
    chunks = _within_chunks(tokens, size, state_PHKV.dtype, in_place=False)
    q, k_end, u, w = chunks.q[0], chunks.k_end[0], chunks.u[0], chunks.w[0]
    asked = torch.cat((w, q), 1).view(states, -1, heads, 2 * size, w.shape[-1])
    read = read_shared(asked, state_PHKV).flatten(0, 2)
    value = u - read[:, :size]
    scale = q.shape[-1] ** -0.5
    before = read[:, size:] * chunks.since[0]
    o = torch.baddbmm(before, chunks.attention, value, alpha=scale, beta=scale)
    written = torch.bmm(k_end.mT, value).view(states, -1, *state_PHKV.shape[1:])
    kept = chunks.since[0, :, -1].view(states, -1, heads, 1, 1)
    new_state = torch.addcmul(written, kept, state_PHKV.unsqueeze(1)).flatten(0, 1)
    return o.view(-1, heads, size, o.shape[-1])[:, :, :num_tokens], new_state


def step_gated_delta_rule(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    beta_BH: Tensor,
    log_decay_BH: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Read one token. Returns (o [B, H, V], new state); the incoming state is left as it was."""
    batch, heads, key_dim = q_BHK.shape
    states, width = state_BHKV.shape[0], v_BHV.shape[-1]
    dtype = torch.promote_types(state_BHKV.dtype, torch.float32)
    state = state_BHKV.to(dtype)
    q, k, v = (x.to(dtype).flatten(0, 1) for x in (q_BHK, k_BHK, v_BHV))
    decay = log_decay_BH.to(dtype).exp()
    beta = beta_BH.to(dtype).reshape(-1, 1)
    # the state is what costs: it is read once for both, o = a S^T q + (q . k) u with u the write
    asked = torch.stack((k, q), 1).view(states, -1, heads, 2, key_dim)
    read = read_shared(asked, state).reshape(-1, 2, width) * decay.reshape(-1, 1, 1)
    value = (v - read[:, 0]) * beta
    o = (read[:, 1] + (q * k).sum(-1, keepdim=True) * value) * key_dim**-0.5
    # a state of fewer rows serves several; this product is also their copy
    new = (state.unsqueeze(1) * decay.view(states, -1, heads, 1, 1)).flatten(0, 2)
    new.baddbmm_(k.unsqueeze(2), value.unsqueeze(1))
    return o.view(batch, heads, width), new.view(batch, heads, key_dim, width)
