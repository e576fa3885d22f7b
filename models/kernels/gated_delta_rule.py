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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.kernels.delta_rule import chunk_size_for, read_shared, unit_lower_inverse


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
    batch, heads, num_tokens, key_dim = q_BHTK.shape
    size = chunk_size or chunk_size_for(num_tokens, key_dim)
    dtype = torch.promote_types(state_BHKV.dtype, torch.float32)
    pad = -num_tokens % size

    def chunks(x: Tensor) -> Tensor:
        # [B, H, T, D] -> [M, N, C, D]; zero tokens at the end write and forget nothing
        x = F.pad(x.to(dtype), (0, 0, 0, pad)) if pad else x.to(dtype)
        return x.reshape(batch * heads, (num_tokens + pad) // size, size, x.shape[-1])

    q, k, v = chunks(q_BHTK), chunks(k_BHTK), chunks(v_BHTV)
    beta, scale = chunks(beta_BHT.unsqueeze(-1)), key_dim**-0.5
    since, between = _decays(chunks(log_decay_BHT.unsqueeze(-1)))
    # beta and scale go to small matrices: a pass over q, k or v costs about as much as a product
    solve = unit_lower_inverse((k @ k.mT * (between * beta)).tril(-1)) * beta.mT
    u, w = solve @ v, (solve * since.mT) @ k
    attention = q @ k.mT * between
    q = q * since
    shared = batch // state_BHKV.shape[0]
    state = state_BHKV.to(dtype)
    if shared > 1 and w.shape[1] == 1:
        k_end, last = k * between[:, :, -1].unsqueeze(-1), since[:, 0, -1:]
        return _one_chunk_of_shared_states(q, k_end, u, w, attention, last, state, num_tokens)
    state = (state.repeat_interleave(shared, 0) if shared > 1 else state).flatten(0, 1)
    new_values, reads, states = _walk(q, k, u, w, since, between, state, stops)
    pairs = (torch.stack(reads, 1), attention, torch.stack(new_values, 1))
    o = torch.baddbmm(*(x.flatten(0, 1) for x in pairs), alpha=scale, beta=scale)
    o = o.reshape(batch, heads, num_tokens + pad, v.shape[-1])[:, :, :num_tokens]
    if stops is not None:
        return o, torch.stack(states)
    return o, states[-1].view(batch, heads, *state.shape[1:])


def _decays(log_decay_MNC1: Tensor) -> tuple[Tensor, Tensor]:
    """Decay from a chunk's start through token i [M, N, C, 1], and from after j through i.

    The second, [M, N, C, C], is zero above its diagonal and one on it.
    """
    # differences of sums: float64 keeps what they would cancel after a token that forgets all
    total = log_decay_MNC1.double().cumsum(2)
    gap = (total - total.mT).to(log_decay_MNC1.dtype)
    future = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device).triu(1)
    # masked before exp: there the gap is positive, and may overflow
    between = gap.masked_fill(future, -torch.inf).exp()
    return total.to(log_decay_MNC1.dtype).exp(), between


def _walk(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor,
    since: Tensor,
    between: Tensor,
    state: Tensor,
    stops: Sequence[int] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The sequential part: per chunk its new values and what the state before it answers.

    Third, the states [M, K, V] at `stops`; without stops the final one.
    """
    size = q.shape[2]
    new_values, reads, stopped = [], [], []
    # unbind, not indexing: the backward of indexing is quadratic in the number of chunks
    pieces = zip(*(x.unbind(1) for x in (q, k, u, w, since, between)), strict=True)
    for n, (q_n, k_n, u_n, w_n, since_n, between_n) in enumerate(pieces):
        value = torch.baddbmm(u_n, w_n, state, alpha=-1)
        new_values.append(value)
        reads.append(torch.bmm(q_n, state))
        piece = (k_n, value, since_n, between_n)
        for stop in stops or ():
            if n * size < stop <= (n + 1) * size:
                stopped.append(_state_after(state, *piece, stop - n * size))
        state = _state_after(state, *piece, size)
    return new_values, reads, stopped if stops is not None else [state]


def _state_after(
    state: Tensor, k: Tensor, value: Tensor, since: Tensor, between: Tensor, num_read: int
) -> Tensor:
    """The state [M, K, V] once the first tokens of a chunk [M, C, D] have been written."""
    kept = state * since[:, num_read - 1 : num_read]
    decayed = k[:, :num_read] * between[:, num_read - 1, :num_read].unsqueeze(-1)
    return torch.baddbmm(kept, decayed.mT, value[:, :num_read])


def _one_chunk_of_shared_states(
    q: Tensor,
    k_end: Tensor,
    u: Tensor,
    w: Tensor,
    attention: Tensor,
    last: Tensor,
    state_PHKV: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` of one chunk [M, 1, C, D] whose P states serve several rows each."""
    states, heads = state_PHKV.shape[:2]
    size = q.shape[2]
    asked = torch.cat((w, q), 2).view(states, -1, heads, 2 * size, w.shape[-1])
    read = read_shared(asked, state_PHKV).flatten(0, 2)
    value = u[:, 0] - read[:, :size]
    scale = k_end.shape[-1] ** -0.5
    o = torch.baddbmm(read[:, size:], attention[:, 0], value, alpha=scale, beta=scale)
    written = torch.bmm(k_end[:, 0].mT, value).view(states, -1, *state_PHKV.shape[1:])
    kept = last.view(states, -1, heads, 1, 1)
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
