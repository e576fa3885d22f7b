"""The deltas of a batch, side by side: which rows can share one, and where each row's delta lies.

Knows deltas and rows by number; knows nothing of slots or sampling. Deltas differ in rank and in
targets; the smaller ones are padded with zeros, which add nothing, while that costs less memory
traffic than a batch of its own. Limit: what has left a batch stays in the buffers until it is
overwritten, or until `forget`.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imprint.models import LoraDelta

Widths = dict[str, tuple[int, int]]
"""Input and output width of each target."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a buffer of deltas holds a row of: targets in a fixed order, and the rank."""

    rank: int
    targets: tuple[str, ...]

    @staticmethod
    def of(delta: LoraDelta) -> "Shape":
        """The shape of one delta."""
        return _shape_of(delta.rank, tuple(delta.a))

    def joined(self, other: "Shape") -> "Shape":
        """The smallest shape that holds both."""
        if other is self or other is NOTHING:
            return self
        if self is NOTHING:
            return other
        targets = tuple(sorted({*self.targets, *other.targets}))
        return Shape(max(self.rank, other.rank), targets)

    def num_floats(self, widths: Widths) -> int:
        """Numbers of one delta of this shape."""
        return self.rank * sum(sum(widths[name]) for name in self.targets)


@lru_cache(maxsize=256)
def _shape_of(rank: int, names: tuple[str, ...]) -> Shape:
    """One object for all deltas of a shape: it is asked for each row of each step."""
    return Shape(rank, tuple(sorted(names)))


NOTHING = Shape(0, ())
NEVER_FILLED = LoraDelta({}, {})
"""What stands for the delta of a row that holds none, not even the zeros of no delta."""


def split(deltas: Seq[LoraDelta | None], widths: Widths, model_floats: int) -> list[list[int]]:
    """Batches of row numbers. Usually one: rows part where padding their deltas would read more
    than the `model_floats` weights that a batch more reads again."""
    rows_of: dict[Shape, list[int]] = {}
    shapes: dict[int, Shape] = {}
    for i, delta in enumerate(deltas):
        if delta is None:
            shape = NOTHING
        else:
            shape = shapes.get(id(delta)) or shapes.setdefault(id(delta), Shape.of(delta))
        rows_of.setdefault(shape, []).append(i)
    batches: list[list[int]] = []
    batch_shape, filled = NOTHING, 0
    for shape in sorted(rows_of, key=lambda shape: shape.num_floats(widths)):
        rows = rows_of[shape]
        joined = batch_shape.joined(shape)
        own = len(rows) * shape.num_floats(widths)
        if batches:
            num = len(batches[-1]) + len(rows)
            if num * joined.num_floats(widths) - filled - own <= model_floats:
                batches[-1] += rows
                batch_shape, filled = joined, filled + own
                continue
        batches.append(list(rows))
        batch_shape, filled = shape, own
    return batches


class DeltaRows:
    """Buffers in which each row of a batch has its delta; only what changed is copied."""

    def __init__(self, widths: Widths) -> None:
        self._widths = widths
        self._shape = NOTHING
        self._held: list[LoraDelta | None] = []
        self._buffers: LoraDelta | None = None
        self._given: LoraDelta | None = None

    def forget(self) -> None:
        """Drop every copy of a delta."""
        self._shape, self._held = NOTHING, []
        self._buffers = self._given = None

    def order(self, deltas: Seq[LoraDelta | None]) -> list[int]:
        """Row numbers, such that as many rows as can be stand where their delta lies already."""
        places: dict[int, list[int]] = {}
        for place in range(min(len(self._held), len(deltas)) - 1, -1, -1):
            places.setdefault(id(self._held[place]), []).append(place)
        order = [-1] * len(deltas)
        homeless = []
        for i, delta in enumerate(deltas):
            found = places.get(id(delta))
            if found:
                order[found.pop()] = i
            else:
                homeless.append(i)
        rest = iter(homeless)
        return [next(rest) if i < 0 else i for i in order]

    @torch.no_grad()
    def stack(self, deltas: Seq[LoraDelta | None]) -> LoraDelta | None:
        """One delta a row, in this order; a single one if all rows have the same; None if none.

        The result is overwritten by the next call.
        """
        first = deltas[0]
        if all(delta is first for delta in deltas):
            return first
        given = self._given
        if given is not None and given.num == len(deltas) and _are_same(self._held, deltas):
            return given
        distinct = {id(delta): delta for delta in deltas if delta is not None}
        shapes = {key: Shape.of(delta) for key, delta in distinct.items()}
        shape = NOTHING
        for found in shapes.values():
            shape = shape.joined(found)
        if shape != self._shape or len(deltas) > len(self._held):
            self._allocate(shape, len(deltas), next(iter(distinct.values())))
        assert self._buffers is not None
        changed = [i for i, delta in enumerate(deltas) if self._held[i] is not delta]
        for i in changed:  # in case that a copy breaks off: then a row is nobody's
            self._held[i] = NEVER_FILLED
        whole = [i for i in changed if shapes.get(id(deltas[i])) == shape]
        for run in _runs(whole):
            _fill(self._buffers, run.start, [distinct[id(deltas[i])] for i in run])
        for i in set(changed).difference(whole):
            _pad(self._buffers, i, deltas[i])
        for i in changed:
            self._held[i] = deltas[i]
        if self._given is None or self._given.num != len(deltas):
            self._given = self._buffers.slice(0, len(deltas))
        elif changed:  # another object, by which whoever keeps copies sees it
            self._given = LoraDelta(self._given.a, self._given.b)
        return self._given

    def _allocate(self, shape: Shape, num: int, like: LoraDelta) -> None:
        """Buffers for `num` rows and some more, in place of the old ones, whose rows they take
        over where they are of this shape."""
        held = self._held if shape == self._shape else []
        rows = max(num, min(2 * len(self._held), 2 * num))
        sample = like.parameters()[0]
        a, b = {}, {}
        for name in shape.targets:
            width_in, width_out = self._widths[name]
            a[name] = sample.new_empty(rows, shape.rank, width_in)
            b[name] = sample.new_empty(rows, width_out, shape.rank)
        buffers = LoraDelta(a, b)
        if held and self._buffers is not None:
            pairs = zip(buffers.parameters(), self._buffers.parameters(), strict=True)
            for mine, theirs in pairs:
                mine[: len(held)] = theirs
        self._shape, self._buffers, self._given = shape, buffers, None
        self._held = held + [NEVER_FILLED] * (rows - len(held))


def _are_same(held: Seq[LoraDelta | None], deltas: Seq[LoraDelta | None]) -> bool:
    """Whether the first of `held` are these."""
    return all(one is other for one, other in zip(held, deltas, strict=False))


def _runs(rows: Seq[int]) -> list[range]:
    """Ascending numbers as ranges without gaps."""
    runs: list[range] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = range(runs[-1].start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs


def _fill(buffers: LoraDelta, first: int, deltas: Seq[LoraDelta]) -> None:
    """Overwrite rows from `first` on with deltas of the buffers' shape: few calls, many rows."""
    last = first + len(deltas)
    for name, place in buffers.a.items():
        torch.cat([delta.a[name] for delta in deltas], out=place[first:last])
    for name, place in buffers.b.items():
        torch.cat([delta.b[name] for delta in deltas], out=place[first:last])


def _pad(buffers: LoraDelta, row: int, delta: LoraDelta | None) -> None:
    """Overwrite a row with a smaller delta, or with none, and with zeros around it."""
    for name in buffers.a:
        _put(buffers.a[name][row : row + 1], None if delta is None else delta.a.get(name))
        _put(buffers.b[name][row : row + 1], None if delta is None else delta.b.get(name))


def _put(place: Tensor, tensor: Tensor | None) -> None:
    place.zero_()
    if tensor is not None:
        place[:, : tensor.shape[1], : tensor.shape[2]] = tensor
