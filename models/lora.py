"""Per-document low-rank deltas: a batched side path in float32 that leaves the base weights alone.

A `LoraDelta` holds Q deltas at once. With a batch of B rows (Q divides B) the rows are grouped:
rows i * B/Q ... (i + 1) * B/Q - 1 use delta i, so one matmul serves Q documents and gradients never
mix.
Shapes: Q = deltas, R = rank, I / O = input / output width of a projection, B = rows, T = tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imprint.models.kernels.lora import lora_add, lora_add_triton, lora_side, runs_on_triton


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """W x becomes W x + B A x, with A [Q, R, I] and B [Q, O, R] per target projection."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    lengths_B: Tensor | None = None
    """For one call with padded rows, see `over`; not a part of what is stored."""

    @classmethod
    def init(
        cls,
        targets: Mapping[str, tuple[int, int]],
        rank: int,
        *,
        seed: int,
        num: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A uniform in +-sqrt(3 / I), the same draw for every delta; B zero: it starts as nothing.

        `targets` maps a projection's name to its (input, output) width.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        generator = torch.Generator().manual_seed(seed)
        a, b = {}, {}
        for name, (width_in, width_out) in targets.items():
            draw = torch.rand(rank, width_in, generator=generator, dtype=torch.float64) * 2 - 1
            draw = (draw * math.sqrt(3 / width_in)).to(device=device, dtype=dtype)
            a[name] = draw.expand(num, -1, -1).clone()
            b[name] = torch.zeros(num, width_out, rank, device=device, dtype=dtype)
        return cls(a, b)

    @property
    def num(self) -> int:
        return next(iter(self.a.values())).shape[0]

    @property
    def rank(self) -> int:
        return next(iter(self.a.values())).shape[1]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parameters())

    def parameters(self) -> list[Tensor]:
        """Every A, then every B, in the order of the targets."""
        return [*self.a.values(), *self.b.values()]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            {name: function(t) for name, t in self.a.items()},
            {name: function(t) for name, t in self.b.items()},
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        for tensor in self.parameters():
            tensor.requires_grad_(requires_grad)
        return self

    def scaled(self, alpha: float) -> Self:
        """The delta times `alpha` (the blend of the gate)."""
        return type(self)(dict(self.a), {name: t * alpha for name, t in self.b.items()})

    def toward(self, other: Self, share: float) -> Self:
        """The way to `other` gone by `share`, parameter by parameter; 1 is `other` itself.

        Both have the same targets, ranks and number. From a delta whose B is zero it is nearly
        `other.scaled(share)`.
        """
        if share == 1.0:
            return other

        def side(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.lerp(t, theirs[name], share) for name, t in mine.items()}

        return type(self)(side(self.a, other.a), side(self.b, other.b))

    @classmethod
    def stack(cls, deltas: Sequence[Self]) -> Self:
        """All deltas of `deltas`, in order; they must share targets and rank."""
        first = deltas[0]
        return cls(
            {name: torch.cat([d.a[name] for d in deltas]) for name in first.a},
            {name: torch.cat([d.b[name] for d in deltas]) for name in first.b},
        )

    @classmethod
    def padded(cls, deltas: Sequence[Self | None]) -> Self | None:
        """One delta for each, of which every one given holds one, or None where none is given.

        Ranks and targets may differ: what one lacks is zeros, which add nothing.
        """
        given = [delta for delta in deltas if delta is not None]
        if not given:
            return None
        sample, rank = given[0].parameters()[0], max(delta.rank for delta in given)
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for i, delta in enumerate(deltas):
            if delta is None:
                continue
            for name, a_1RI in delta.a.items():
                b_1OR = delta.b[name]
                if name not in a:
                    a[name] = sample.new_zeros(len(deltas), rank, a_1RI.shape[2])
                    b[name] = sample.new_zeros(len(deltas), b_1OR.shape[1], rank)
                a[name][i, : delta.rank] = a_1RI[0]
                b[name][i, :, : delta.rank] = b_1OR[0]
        return cls(a, b)

    def joined(self, other: Self) -> Self:
        """The sum of both deltas, as one of both ranks together; their targets may differ."""

        def side(
            mine: dict[str, Tensor], theirs: dict[str, Tensor], axis: int
        ) -> dict[str, Tensor]:
            parts = {}
            for name in {**mine, **theirs}:
                like = mine.get(name, theirs.get(name))
                assert like is not None
                pair = []
                for tensors, rank in ((mine, self.rank), (theirs, other.rank)):
                    shape = [rank if i == axis else size for i, size in enumerate(like.shape)]
                    pair.append(tensors[name] if name in tensors else like.new_zeros(shape))
                parts[name] = torch.cat(pair, axis)
            return parts

        return type(self)(side(self.a, other.a, 1), side(self.b, other.b, 2))

    def slice(self, start: int, stop: int) -> Self:
        return self._map(lambda t: t[start:stop])

    def over(self, lengths_B: Tensor) -> Self:
        """The same delta for rows of so many tokens: kernels may leave out the padding."""
        return type(self)(self.a, self.b, lengths_B)

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    def clone(self) -> Self:
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda t: t.to(device))

    def to_tensors(self, prefix: str = "delta.") -> dict[str, Tensor]:
        """Flat names `<prefix>a.<target>` and `<prefix>b.<target>` for safetensors."""
        named = [("a", self.a), ("b", self.b)]
        return {
            f"{prefix}{side}.{name}": t.detach().contiguous()
            for side, tensors in named
            for name, t in tensors.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "delta.") -> Self:
        """The inverse of `to_tensors`; names without the prefix are passed over."""

        def side(letter: str) -> dict[str, Tensor]:
            start = f"{prefix}{letter}."
            return {key[len(start) :]: t for key, t in tensors.items() if key.startswith(start)}

        return cls(side("a"), side("b"))

    def apply(self, name: str, x_BTI: Tensor) -> Tensor | None:
        """B A x for the projection `name`, or None if it is not a target. Result [B, T, O]."""
        pair = self._pair(name, x_BTI)
        if pair is None:
            return None
        a_QRI, b_QOR = pair
        if runs_on_triton(x_BTI, a_QRI):
            return self._on_triton(None, x_BTI, a_QRI, b_QOR)
        # batched for a single delta, too: other products round otherwise, and alone must be as in
        # company, bit for bit
        x_QNI = x_BTI.reshape(len(a_QRI), -1, x_BTI.shape[-1])
        return lora_side(x_QNI, a_QRI, b_QOR).view(*x_BTI.shape[:2], -1)

    def add(self, name: str, y_BTO: Tensor, x_BTI: Tensor) -> Tensor:
        """y + B A x in the dtype of `y_BTO`; y itself where `name` is not a target."""
        pair = self._pair(name, x_BTI)
        if pair is None:
            return y_BTO
        if runs_on_triton(x_BTI, pair[0]):
            return self._on_triton(y_BTO, x_BTI, *pair)
        shape, num = y_BTO.shape, len(pair[0])
        y_QNO = y_BTO.reshape(num, -1, shape[-1])
        return lora_add(y_QNO, x_BTI.reshape(num, -1, x_BTI.shape[-1]), *pair).view(shape)

    def _on_triton(
        self, y_BTO: Tensor | None, x_BTI: Tensor, a_QRI: Tensor, b_QOR: Tensor
    ) -> Tensor:
        if self.lengths_B is not None:
            return lora_add_triton(y_BTO, x_BTI, a_QRI, b_QOR, self.lengths_B)
        shape, num = x_BTI.shape, len(a_QRI)
        y_QNO = None if y_BTO is None else y_BTO.reshape(num, -1, y_BTO.shape[-1])
        x_QNI = x_BTI.reshape(num, -1, shape[-1])
        return lora_add_triton(y_QNO, x_QNI, a_QRI, b_QOR).view(*shape[:-1], -1)

    def _pair(self, name: str, x_BTI: Tensor) -> tuple[Tensor, Tensor] | None:
        """A and B of a target that are to serve the rows of `x_BTI`."""
        a_QRI = self.a.get(name)
        if a_QRI is None:
            return None
        if x_BTI.shape[0] % a_QRI.shape[0]:
            raise ValueError(
                f"{a_QRI.shape[0]} deltas cannot serve a batch of {x_BTI.shape[0]} rows"
            )
        return a_QRI, self.b[name]


class DeltaLinear(nn.Linear):
    """A projection that a `LoraDelta` can change; `target` is its name in there."""

    def __init__(self, width_in: int, width_out: int, target: str, *, bias: bool = False) -> None:
        super().__init__(width_in, width_out, bias=bias)
        self.target = target

    def targets(self) -> dict[str, tuple[int, int]]:
        """What a delta can change here: name -> (input width, output width)."""
        return {self.target: (self.in_features, self.out_features)}

    def forward(self, x_BTI: Tensor, delta: LoraDelta | None = None) -> Tensor:
        y_BTO = F.linear(x_BTI, self.weight, self.bias)
        return y_BTO if delta is None else self._add(delta, y_BTO, x_BTI)

    def _add(self, delta: LoraDelta, y_BTO: Tensor, x_BTI: Tensor) -> Tensor:
        return delta.add(self.target, y_BTO, x_BTI)


class FusedDeltaLinear(DeltaLinear):
    """Projections of one input that checkpoints keep as one weight, each a target of its own.

    So the same names are targets in every architecture, however its weights are stored.
    """

    def __init__(
        self, width_in: int, width_out: int, parts: Sequence[str], *, bias: bool = False
    ) -> None:
        """`parts`: the targets' names in order; each gets an equal share of `width_out`."""
        super().__init__(width_in, width_out, parts[0], bias=bias)
        self.parts = tuple(parts)

    def targets(self) -> dict[str, tuple[int, int]]:
        """What a delta can change here: name -> (input width, output width)."""
        width = self.out_features // len(self.parts)
        return dict.fromkeys(self.parts, (self.in_features, width))

    def _add(self, delta: LoraDelta, y_BTO: Tensor, x_BTI: Tensor) -> Tensor:
        sides = [delta.apply(name, x_BTI) for name in self.parts]
        like = next((side for side in sides if side is not None), None)
        if like is None:
            return y_BTO
        empty = like.new_zeros(1).expand_as(like)
        side_BTO = torch.cat([empty if side is None else side for side in sides], -1)
        return (y_BTO + side_BTO).to(y_BTO.dtype)
