"""Rings of a document's last tokens: that of place p is kept at p modulo L, so that a new token
overwrites the oldest one and nothing else moves.

Shapes: B = batch, P = rings (P divides B), L = tokens that a ring keeps, T = new tokens,
D = numbers of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Turn:
    """Of each row L tokens that follow one another, turned; made once for all layers.

    As parts to put together, where all rows are turned alike; otherwise as places.
    """

    parts: tuple[slice, ...]
    places_BL: Tensor | None

    @classmethod
    def of(
        cls, starts: Sequence[int], firsts: Sequence[int], size: int, device: torch.device
    ) -> Self:
        """Of row i the tokens from `starts[i]` on, from the `firsts[i]`-th of them, modulo `size`,
        round to the one before it."""
        firsts = [first % size for first in firsts]
        start, first = starts[0], firsts[0]
        if len({*starts}) == len({*firsts}) == 1:
            late, early = slice(start + first, start + size), slice(start, start + first)
            return cls((late, early) if first else (late,), None)
        start_B1, first_B1 = (torch.tensor(x, device=device)[:, None] for x in (starts, firsts))
        return cls((), start_B1 + (torch.arange(size, device=device) + first_B1) % size)

    def __call__(self, x_BSD: Tensor) -> list[Tensor]:
        """What makes up [B, L, D] along its second axis: views, if there are parts."""
        if self.places_BL is None:
            return [x_BSD[:, part] for part in self.parts]
        row_B = torch.arange(len(self.places_BL), device=x_BSD.device)
        return [x_BSD[row_B[:, None], self.places_BL]]


def unrolling(positions_P: Sequence[int], size: int, device: torch.device) -> Turn:
    """The turn for `unroll` of rings that have been given so many tokens."""
    return Turn.of([0] * len(positions_P), positions_P, size, device)


def unroll(ring_PLD: Tensor, new_BTD: Tensor, turn: Turn) -> Tensor:
    """The tokens of rings in the order of their reading, each ring for B / P rows, then new ones.

    Where a ring has been given fewer than L, what it had in the other places comes first. Returns
    [B, L + T, D].
    """
    rows = ring_PLD.shape[0]
    new = torch.unflatten(new_BTD, 0, (rows, -1)).to(ring_PLD.dtype)
    before = [part.unsqueeze(1).expand(-1, new.shape[1], -1, -1) for part in turn(ring_PLD)]
    return torch.cat((*before, new), 2).flatten(0, 1)


def rolling_up(
    num_read_B: Sequence[int], ends_B: Sequence[int], size: int, device: torch.device
) -> Turn:
    """The turn for `roll_up` where rows have read so many of the new tokens, and so many in all."""
    return Turn.of(num_read_B, [-end for end in ends_B], size, device)


def roll_up(joined_BSD: Tensor, num_rings: int, turn: Turn) -> Tensor:
    """The inverse: rings of L earlier tokens and some new ones, in memory of their own. One row can
    make many rings."""
    parts = turn(joined_BSD.expand(num_rings, -1, -1))
    return parts[0] if turn.places_BL is not None else torch.cat(parts, 1)


def last_tokens(
    ring_NLD: Tensor, rows: Sequence[int], ends: Sequence[int], num_tokens: int
) -> Tensor:
    """The last `num_tokens` tokens of some rings, oldest first: [len(rows), num_tokens, D].

    Ring `rows[i]` has been given `ends[i]` tokens.
    """
    size = ring_NLD.shape[1]
    place_BL = torch.tensor(ends)[:, None] + torch.arange(-num_tokens, 0)
    row_B1 = torch.tensor(rows, device=ring_NLD.device)[:, None]
    return ring_NLD[row_B1, place_BL.to(ring_NLD.device) % size]
