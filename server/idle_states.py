"""States of idle adapters in int8: a quarter of a matrix's bytes, at the price of rounding.

Only the matrices that hold a document are packed (four axes: row, head, and the matrix), one scale
for each of their rows. The last inputs of convolutions, windows of attention, counters, tokens,
entropies and the delta stay exact: they are small, and the delta was accepted as it is. The file of
an adapter always holds the exact state. Limit: knows no tier and no policy; the error this costs is
measured by `benchmarks/idle_states.py`.
Shapes: a matrix [1, heads, rows, columns] has scales [1, heads, rows, 1].
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.adapters.adapter import Adapter
from imprint.models import RecurrentState

INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class Int8:
    """A tensor as small integers times a scale for each row."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Int8":
        """The nearest integers; the largest value of each row becomes 127."""
        scales = tensor.abs().amax(-1, keepdim=True) / INT8_MAX
        scales = torch.where(scales == 0, 1, scales)  # a row of zeros
        values = (tensor / scales).round().to(torch.int8)
        return cls(values, scales, tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.nbytes + self.scales.nbytes

    def tensor(self, device: torch.device) -> Tensor:
        """The values again, rounded: off by half a scale at most."""
        return self.values.to(device).to(self.dtype) * self.scales.to(device)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter that nobody uses now, with its state in int8, on the host."""

    rest: Adapter
    """The adapter; of its state only what is not packed."""
    layers: tuple[dict[str, Int8], ...]

    @classmethod
    def of(cls, adapter: Adapter) -> "PackedAdapter":
        """Pack it. A matrix that is not finite stays as it is."""
        adapter = adapter.to("cpu")
        packed = tuple(
            {name: Int8.of(tensor) for name, tensor in layer.items() if _is_packed(tensor)}
            for layer in adapter.state.layers
        )
        # copies: as views of what was read from a file they would keep the matrices in memory
        rest = tuple(
            {name: tensor.clone() for name, tensor in layer.items() if name not in mine}
            for layer, mine in zip(adapter.state.layers, packed, strict=True)
        )
        return cls(dataclasses.replace(adapter, state=RecurrentState(rest)), packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.rest.nbytes + sum(
            matrix.nbytes for layer in self.layers for matrix in layer.values()
        )

    def to(self, device: torch.device) -> Adapter:
        """The adapter for use."""
        rest = self.rest.to(device)
        layers = tuple(
            {**layer, **{name: matrix.tensor(device) for name, matrix in mine.items()}}
            for layer, mine in zip(rest.state.layers, self.layers, strict=True)
        )
        return dataclasses.replace(rest, state=RecurrentState(layers))


def _is_packed(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 4 and bool(tensor.isfinite().all())
