"""One token a row for LaCT, on the rings and fast weights of a pool, where they lie.

The window's attention of the newest token, and what the fast weights say to it; in plain torch, or
as the kernels of `triton_lact_step.py`. No gradients.
Shapes: B = rows, N = states of the pool, L = tokens that a ring keeps, H = heads, K = width of a
head, D = H K, E = inner width of the fast weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.kernels import uses_triton
from imprint.models.kernels.lact import FastWeights, read_fast_weights


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which states of a pool read a token, and of which place in their documents."""

    rows_B: Tensor
    """State of each row of the batch; they differ, except for padding that nobody reads."""
    is_all: bool
    """Whether these are all the states of the pool, in order."""
    places_B: Tensor
    """Tokens that each row has read before this one."""
    known: tuple[Sequence[int], Sequence[int]] | None
    """Both on the host; None where nobody waits for the device: then no work depends on them."""
    cells_B: Tensor
    """Where in its ring the token goes."""

    @classmethod
    def of(
        cls, positions_N: Tensor, rows_B: Tensor | None, ring_size: int, *, waits: bool = True
    ) -> Self:
        """Rows of a pool whose states have read so many tokens; None: all. `waits`: to know them on
        the host, for the device."""
        is_all = rows_B is None
        if rows_B is None:
            rows_B = torch.arange(len(positions_N), device=positions_N.device)
        places_B = positions_N[rows_B]
        known = (rows_B.tolist(), places_B.tolist()) if waits else None
        return cls(rows_B, is_all, places_B, known, places_B % ring_size)

    def put(self, ring_NLD: Tensor, token_BD: Tensor) -> None:
        """Write each row's token over the oldest of its ring."""
        ring_NLD.index_put_((self.rows_B, self.cells_B), token_BD.to(ring_NLD.dtype))


def attend_ring(q_BHK: Tensor, k_NLD: Tensor, v_NLD: Tensor, window: int, at: StepRows) -> Tensor:
    """Attention of each row's newest token, already in its ring, to the last `window` tokens,
    itself among them: [B, H, K] in the type of the rings."""
    if _runs_on_triton(k_NLD):
        from imprint.models.kernels import triton_lact_step

        return triton_lact_step.attend_ring(q_BHK, k_NLD, v_NLD, window, at)
    return plain_attend_ring(q_BHK, k_NLD, v_NLD, window, at)


def read_rows(
    weights: FastWeights,
    initial: FastWeights | None,
    stepped_from: int,
    q_BHK: Tensor,
    at: StepRows,
) -> Tensor:
    """What each row's fast weights [N, H, ...] say to its query: [B, H, K].

    Rows at a place before `stepped_from` read `initial` (one row), which may be None where there
    are none.
    """
    if _runs_on_triton(weights.w0):
        from imprint.models.kernels import triton_lact_step

        return triton_lact_step.read_rows(weights, initial, stepped_from, q_BHK, at)
    return plain_read_rows(weights, initial, stepped_from, q_BHK, at)


def plain_attend_ring(
    q_BHK: Tensor, k_NLD: Tensor, v_NLD: Tensor, window: int, at: StepRows
) -> Tensor:
    """`attend_ring` in plain torch."""
    q_BH1K = q_BHK.to(k_NLD.dtype).unsqueeze(2)
    k_NHLK, v_NHLK = (
        torch.unflatten(x_NLD, -1, (q_BHK.shape[1], -1)).transpose(1, 2) for x_NLD in (k_NLD, v_NLD)
    )
    if _copies(at, k_NLD):
        if not at.is_all:
            k_NHLK, v_NHLK = k_NHLK[at.rows_B], v_NHLK[at.rows_B]
        places = None if at.known is None else at.known[1]
        return _attend(q_BH1K, k_NHLK, v_NHLK, window, places, at.places_B).squeeze(2)
    assert at.known is not None
    outs = []
    for i, (row, place) in enumerate(zip(*at.known, strict=True)):
        mine, own = slice(i, i + 1), slice(row, row + 1)
        outs.append(
            _attend(q_BH1K[mine], k_NHLK[own], v_NHLK[own], window, [place], at.places_B[mine])
        )
    return torch.cat(outs).squeeze(2)


def plain_read_rows(
    weights: FastWeights,
    initial: FastWeights | None,
    stepped_from: int,
    q_BHK: Tensor,
    at: StepRows,
) -> Tensor:
    """`read_rows` in plain torch."""
    q_BH1K = q_BHK.unsqueeze(2)
    if initial is not None and at.known is not None and max(at.known[1]) < stepped_from:
        return read_fast_weights(initial, q_BH1K).squeeze(2)
    if _copies(at, weights.w0):
        if not at.is_all:
            weights = FastWeights(*(w[at.rows_B] for w in weights))
        if initial is not None:
            own_B111 = (at.places_B >= stepped_from)[:, None, None, None]
            pairs = zip(weights, initial, strict=True)
            weights = FastWeights(*(torch.where(own_B111, own, start) for own, start in pairs))
        return read_fast_weights(weights, q_BH1K).squeeze(2)
    assert at.known is not None
    outs = []
    for i, (row, place) in enumerate(zip(*at.known, strict=True)):
        mine = weights if place >= stepped_from or initial is None else initial
        first = row if mine is weights else 0
        mine = FastWeights(*(w[first : first + 1] for w in mine))
        outs.append(read_fast_weights(mine, q_BH1K[i : i + 1]))
    return torch.cat(outs).squeeze(2)


def _copies(at: StepRows, pool: Tensor) -> bool:
    """Whether all rows go at once, on copies if need be: on a CPU copies cost more than calls."""
    return pool.device.type != "cpu" or at.is_all or at.known is None


def _attend(
    q_BH1K: Tensor,
    k_BHLK: Tensor,
    v_BHLK: Tensor,
    window: int,
    places: Sequence[int] | None,
    places_B: Tensor,
) -> Tensor:
    """Attention of newest tokens, at these places of their documents, to rings of their own."""
    size, mask = k_BHLK.shape[2], None
    if places is not None and len({*places}) == 1 and places[0] < min(size, window):
        k_BHLK, v_BHLK = (x[:, :, : places[0] + 1] for x in (k_BHLK, v_BHLK))  # from the start
    elif places is None or window < size or min(places) < size - 1:
        place_B1 = places_B[:, None]
        ago_BL = (place_B1 - torch.arange(size, device=places_B.device)) % size
        mask = (ago_BL < (place_B1 + 1).clamp(max=window))[:, None, None]
    return F.scaled_dot_product_attention(q_BH1K, k_BHLK, v_BHLK, attn_mask=mask)


def _runs_on_triton(pool: Tensor) -> bool:
    return pool.dtype != torch.float64 and uses_triton(pool.device)
