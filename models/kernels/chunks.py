"""How the plain delta rules cut a reading: into chunks, and blocks of them that stay in a cache.

All chunks of a block are computed at once as far as they do not need the state, so its tensors are
written and read again several times: in a long reading, from memory, which takes longer than the
products themselves. Shapes: B = batch, H = heads, T = tokens, C = tokens of a chunk, N = chunks,
M = B * H, D = any width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 16
"""A chunk holds a multiple of so many tokens."""
WHOLE_VECTORS = 64
"""A multiple of how many float32 any CPU's vectors hold: the rest is rounded otherwise."""
_BLOCK_ELEMENTS = 2**18
"""Of one tensor of a block, [M, tokens, D]: a megabyte in float32."""


def chunk_size_for(num_tokens: int, head_dim: int) -> int:
    """Tokens of a chunk that are fastest on a CPU."""
    # measured on two cores: 32 is fastest up to 64-wide heads, 64 above
    largest = 32 if head_dim <= 64 else 64
    size = SMALLEST
    while size < min(num_tokens, largest):
        size *= 2
    return size


def blocks(tensors_BHTD: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of every tensor, block by block: whole chunks of `size`, but for the last."""
    batch, heads, _, width = tensors_BHTD[0].shape
    num_tokens = max(1, _BLOCK_ELEMENTS // (batch * heads * width * size)) * size
    # split, not indexing: the backward of indexing is quadratic in the number of blocks
    return zip(*(torch.split(x, num_tokens, 2) for x in tensors_BHTD), strict=True)


def to_chunks(x_BHTD: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[N, M, C, D], contiguous; zero tokens fill the last chunk."""
    batch, heads, num_tokens, width = x_BHTD.shape
    pad = -num_tokens % size
    x = F.pad(x_BHTD.to(dtype), (0, 0, 0, pad)) if pad else x_BHTD.to(dtype)
    x = x.reshape(batch, heads, -1, size, width).permute(2, 0, 1, 3, 4)
    return x.reshape(-1, batch * heads, size, width)


def own_state(state_PHKV: Tensor, shared: int, *, in_place: bool) -> Tensor:
    """[M, K, V], a row for each of the `shared` rows that a state serves; free to overwrite if
    `in_place`."""
    if shared > 1:
        return state_PHKV.repeat_interleave(shared, 0).flatten(0, 1)
    state = state_PHKV.flatten(0, 1)
    return state.clone() if in_place else state


class Outputs:
    """What the blocks of a reading answer, put together: [B, H, T, V]."""

    def __init__(self, v_BHTV: Tensor, dtype: torch.dtype, *, in_place: bool) -> None:
        """For the values of all tokens. `in_place`: nothing of it has a gradient."""
        self._batch, self._heads, self._num_tokens, _ = v_BHTV.shape
        self._room = (
            torch.empty(v_BHTV.shape, dtype=dtype, device=v_BHTV.device) if in_place else None
        )
        self._parts: list[Tensor] = []
        self._num_done = 0

    def add(self, o_NMCV: Tensor) -> None:
        """The chunks that follow; what `to_chunks` filled in at the end goes."""
        num, _, size, width = o_NMCV.shape
        o = o_NMCV.view(num, self._batch, self._heads, size, width).permute(1, 2, 0, 3, 4)
        first = self._num_done
        num_tokens = min(num * size, self._num_tokens - first)
        self._num_done += num_tokens
        if self._room is not None and num_tokens == num * size:
            self._room[:, :, first : first + num_tokens].view(o.shape).copy_(o)
            return
        part = o.reshape(self._batch, self._heads, num * size, width)[:, :, :num_tokens]
        if self._room is not None:
            self._room[:, :, first : first + num_tokens] = part
        else:
            self._parts.append(part)

    def joined(self) -> Tensor:
        """All that was added."""
        if self._room is not None:
            return self._room
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, 2)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether what is computed from them has a gradient; if not, it may be computed in place."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
