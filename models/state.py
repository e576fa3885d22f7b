"""The recurrent state of a batch of sequences: what a fast-weight model remembers, a constant size.

Every tensor has the batch first. States are values: operations return new states and leave the old
one alone, save for `zero_` and `write_`, which serve the slot pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """Per layer a dict of tensors, as its mixer needs them; a document starts from zeros.

    For the delta rules `S` [B, H, K, V] in float32 at least, and `conv_q`, `conv_k`, `conv_v`
    [B, W - 1, D], the last inputs of the short convolutions.
    """

    layers: tuple[dict[str, Tensor], ...]

    @property
    def batch_size(self) -> int:
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order (layer, then name)."""
        return [layer[name] for layer in self.layers for name in sorted(layer)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(
            tuple({n: function(t) for n, t in layer.items()} for layer in self.layers)
        )

    def fork(self, num: int = 1) -> Self:
        """Copies: row i becomes rows i * num ... (i + 1) * num - 1. Differentiable."""
        return self._map(lambda t: t.repeat_interleave(num, 0))

    @classmethod
    def stack(cls, states: Sequence[Self]) -> Self:
        """One state whose rows are the rows of `states`, in order. Differentiable."""
        return cls(
            tuple(
                {name: torch.cat([s.layers[i][name] for s in states]) for name in layer}
                for i, layer in enumerate(states[0].layers)
            )
        )

    def slice(self, start: int, stop: int) -> Self:
        """Rows start ... stop - 1, as views."""
        return self._map(lambda t: t[start:stop])

    def select(self, rows: Sequence[int] | Tensor) -> Self:
        """The given rows, copied. Differentiable."""
        device = self.tensors()[0].device
        index = torch.as_tensor(rows, dtype=torch.long, device=device)
        return self._map(lambda t: t.index_select(0, index))

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    def clone(self) -> Self:
        return self._map(Tensor.clone)

    def leaf(self) -> Self:
        """A detached copy whose tensors require gradients; counters, being integers, do not."""
        return self._map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))

    def grads(self) -> list[Tensor | None]:
        """The gradients of a `leaf`'s tensors, in the order of `tensors`."""
        return [tensor.grad for tensor in self.tensors()]

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda t: t.to(device))

    def is_finite(self) -> bool:
        """Whether there is neither an infinity nor a not-a-number in it."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    def zero_(self, rows: Sequence[int] | None = None) -> None:
        """Set all rows, or the given ones, to the state of a document's start."""
        with torch.no_grad():
            for tensor in self.tensors():
                if rows is None:
                    tensor.zero_()
                else:
                    for row in rows:  # mostly one, and then no index has to be made
                        tensor[row].zero_()

    def write_(self, rows: Sequence[int], other: Self) -> None:
        """Overwrite the given rows with the rows of `other`."""
        with torch.no_grad():
            index = torch.as_tensor(rows, dtype=torch.long, device=self.tensors()[0].device)
            for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
                mine.index_copy_(0, index, theirs.to(mine.dtype))

    def to_tensors(self, prefix: str = "state.") -> dict[str, Tensor]:
        """Flat names `<prefix><layer>.<name>`, contiguous, for safetensors."""
        return {
            f"{prefix}{i}.{name}": tensor.detach().contiguous()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str = "state.") -> Self:
        """The inverse of `to_tensors`; names without the prefix are passed over."""
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                index, name = key[len(prefix) :].split(".", 1)
                layers.setdefault(int(index), {})[name] = tensor
        return cls(tuple(layers[i] for i in range(len(layers))))

    def save(self, path: Path) -> None:
        save_file({k: v.cpu() for k, v in self.to_tensors().items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.from_tensors(load_file(path))
