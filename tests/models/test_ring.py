"""Rings of the last tokens against lists of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imprint.models.ring import last_tokens, roll_up, rolling_up, unroll, unrolling

SIZE, WIDTH = 5, 3
CPU = torch.device("cpu")


def document(row: int, length: int) -> Tensor:
    """Tokens that tell their row and place: [length, WIDTH]."""
    place = torch.arange(1, length + 1, dtype=torch.float64)
    return (1000.0 * (row + 1) + place)[:, None] + torch.arange(WIDTH) / 10


def rings(lengths: list[int]) -> Tensor:
    """[rows, SIZE, WIDTH], a token at a time."""
    ring = torch.zeros(len(lengths), SIZE, WIDTH, dtype=torch.float64)
    for row, length in enumerate(lengths):
        for place, token in enumerate(document(row, length)):
            ring[row, place % SIZE] = token
    return ring


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("lengths", [[7, 7], [5, 10], [0, 3], [2, 2], [4, 13]])
def test_unrolled_tokens_are_in_the_order_of_their_reading(lengths: list[int], group: int) -> None:
    new = torch.stack([torch.full((4, WIDTH), -1.0 - row) for row in range(2 * group)])
    joined = unroll(rings(lengths), new, unrolling(lengths, SIZE, CPU))
    assert joined.shape == (2 * group, SIZE + 4, WIDTH)
    for row in range(2 * group):
        seen = min(lengths[row // group], SIZE)
        right = document(row // group, lengths[row // group])[-seen:] if seen else torch.zeros(0, 3)
        assert torch.equal(joined[row, SIZE - seen : SIZE], right)
        assert torch.equal(joined[row, SIZE:], new[row].double())


@pytest.mark.parametrize("num_read", [[3, 3], [6, 6], [0, 2], [6, 1]])
@pytest.mark.parametrize("lengths", [[7, 7], [5, 10], [0, 3], [4, 9]])
def test_rolled_up_tokens_are_where_single_ones_would_be(
    lengths: list[int], num_read: list[int]
) -> None:
    ends = [a + b for a, b in zip(lengths, num_read, strict=True)]
    new = torch.full((2, 6, WIDTH), torch.nan, dtype=torch.float64)  # padding must not get in
    for row, (length, num) in enumerate(zip(lengths, num_read, strict=True)):
        new[row, :num] = document(row, length + num)[length:]
    joined = unroll(rings(lengths), new, unrolling(lengths, SIZE, CPU))
    turn = rolling_up(num_read, ends, SIZE, CPU)
    assert torch.equal(roll_up(joined, 2, turn), rings(ends))


@pytest.mark.parametrize("stops", [[1, 4, 4, 9], [9], [3, 3]])
def test_one_row_makes_a_ring_for_every_stop(stops: list[int]) -> None:
    new = document(0, 12)[3:].unsqueeze(0)
    joined = unroll(rings([3]), new, unrolling([3], SIZE, CPU))
    turn = rolling_up(stops, [3 + stop for stop in stops], SIZE, CPU)
    found = roll_up(joined, len(stops), turn)
    right = [rings([3 + stop])[0] for stop in stops]
    assert torch.equal(found, torch.stack(right))


def test_the_last_tokens_of_some_rings() -> None:
    found = last_tokens(rings([8, 2, 16]), [2, 0], [16, 8], 4)
    assert torch.equal(found, torch.stack([document(2, 16)[-4:], document(0, 8)[-4:]]))
    assert torch.equal(last_tokens(rings([10]), [0], [10], SIZE)[0], document(0, 10)[-SIZE:])
