"""Deltas side by side: as they are alone, moved as little as can be, padded within reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imprint.models import LoraDelta
from imprint.server import delta_rows
from imprint.server.delta_rows import DeltaRows, split

WIDTHS = {"in": (6, 4), "out": (4, 6)}
PLENTY = 10**9


def delta_of(seed: int, rank: int = 2, targets: tuple[str, ...] = ("in", "out")) -> LoraDelta:
    delta = LoraDelta.init({name: WIDTHS[name] for name in targets}, rank, seed=seed)
    for tensor in delta.b.values():
        tensor.normal_(generator=torch.Generator().manual_seed(seed))
    return delta


def effect(delta: LoraDelta | None, name: str, x_BTI: torch.Tensor) -> torch.Tensor:
    side = None if delta is None else delta.apply(name, x_BTI)
    return x_BTI.new_zeros(*x_BTI.shape[:2], WIDTHS[name][1]) if side is None else side


@pytest.mark.parametrize("num", [1, 2, 5])
def test_each_row_gets_its_own_delta(num: int) -> None:
    rows = DeltaRows(WIDTHS)
    choices = [
        delta_of(1),
        None,
        delta_of(2, rank=5),
        delta_of(3, rank=1, targets=("out",)),
        delta_of(4, targets=("in",)),
    ]
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):  # buffers are reused, padded anew and reallocated
        picks = torch.randint(len(choices), (num,), generator=draw).tolist()
        deltas = [choices[pick] for pick in picks]
        order = rows.order(deltas)
        assert sorted(order) == list(range(num))
        deltas = [deltas[i] for i in order]
        stacked = rows.stack(deltas)
        for name, (width, _) in WIDTHS.items():
            x_BTI = torch.randn(num, 3, width, generator=draw)
            together = effect(stacked, name, x_BTI)
            alone = torch.cat([effect(d, name, x_BTI[i : i + 1]) for i, d in enumerate(deltas)])
            torch.testing.assert_close(together, alone)


def test_rows_that_share_a_delta_are_not_stacked() -> None:
    delta = delta_of(1)
    assert DeltaRows(WIDTHS).stack([delta] * 3) is delta
    assert DeltaRows(WIDTHS).stack([None, None]) is None


def test_who_leaves_moves_only_one_of_those_who_stay() -> None:
    rows, deltas = DeltaRows(WIDTHS), [delta_of(seed) for seed in range(5)]
    first = rows.stack(deltas)
    assert rows.stack(deltas) is first  # nothing changed
    stay = [deltas[0], deltas[2], deltas[3], deltas[4]]
    assert rows.order(stay) == [0, 3, 1, 2]  # the last one takes the empty place
    other = rows.stack([*deltas[:4], delta_of(9)])
    assert other is not first  # by this whoever keeps copies sees that one has changed
    assert rows.stack(deltas) is not other
    rows.stack([stay[i] for i in rows.order(stay)])
    assert rows.order([*stay, deltas[1]]) == [0, 3, 1, 2, 4]


def test_nothing_is_left_after_forget() -> None:
    rows = DeltaRows(WIDTHS)
    stacked = rows.stack([delta_of(1), delta_of(2)])
    rows.forget()
    assert stacked is not None
    assert rows.order([delta_of(3), delta_of(2)]) == [0, 1]
    assert rows._buffers is None


@pytest.mark.parametrize("part", ["_fill", "_pad"])
def test_a_copy_that_breaks_off_leaves_no_row_to_the_delta_it_had(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    rows, deltas = DeltaRows(WIDTHS), [delta_of(1), delta_of(2)]
    rows.stack(deltas)
    copy = getattr(delta_rows, part)

    def break_off(*given: Any) -> None:
        copy(*given)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(delta_rows, part, break_off)
    other = delta_of(3) if part == "_fill" else delta_of(3, targets=("in",))
    with pytest.raises(RuntimeError, match="out of memory"):
        rows.stack([deltas[0], other])
    monkeypatch.undo()
    after = rows.stack(deltas)
    assert after is not None
    for name in WIDTHS:
        assert torch.equal(after.b[name][1:], deltas[1].b[name])


def test_rows_part_only_where_padding_costs_more_than_reading_the_weights_again() -> None:
    small, large = delta_of(1, rank=1), delta_of(2, rank=100)
    deltas = [small, None, large, small, None]
    assert split(deltas, WIDTHS, PLENTY) == [[1, 4, 0, 3, 2]]
    # padded are 4 rows to rank 100, of which two hold one rank: (5 * 100 - 102) * 20 numbers
    assert len(split(deltas, WIDTHS, 398 * 20)) == 1
    assert split(deltas, WIDTHS, 398 * 20 - 1) == [[1, 4, 0, 3], [2]]
    assert split(deltas, WIDTHS, 0) == [[1, 4], [0, 3], [2]]
    assert split([], WIDTHS, 0) == []
