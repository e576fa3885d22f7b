"""Which stored tensor each parameter of a model is read from; the spellings that checkpoints had.

Public checkpoints were written over years by versions of flash-linear-attention whose modules had
other tensors. What is known of them is listed here, each with its condition; anything else that
does not fit is a problem with a name. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from imprint.models.shards import ITEM_BYTES, StoredTensor

EMBEDDINGS: Final = "model.embeddings.weight"
LM_HEAD: Final = "lm_head.weight"

_GATE = ".mlp.gate_proj.weight"
_UP = ".mlp.up_proj.weight"
_UNUSED_D = re.compile(r"(model\.layers\.\d+\.attn\.)D")


@dataclass(frozen=True, slots=True)
class Piece:
    """What one parameter is read from: a stored tensor from row `first_row` on."""

    source: StoredTensor
    first_row: int
    shape: tuple[int, ...]
    """Shape of the parameter; trailing sizes are those of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How a checkpoint fills a model; usable where `problems` is empty."""

    pieces: dict[str, Piece]
    """By parameter name."""
    zeros: tuple[StoredTensor, ...]
    """Tensors without a parameter. They may be left out only if every number in them is zero."""
    repeats: dict[str, StoredTensor]
    """Stored copies of a tied parameter, by the name of the parameter they must equal."""
    problems: tuple[str, ...]
    """What is missing, misshapen, of a type that is not read, or unexpected; one line each."""

    @property
    def sources(self) -> list[StoredTensor]:
        """Every stored tensor that is read."""
        pieces = [piece.source for piece in self.pieces.values()]
        return [*pieces, *self.zeros, *self.repeats.values()]


def plan_load(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], *, tied: bool
) -> LoadPlan:
    """Find every parameter of `expected` (name -> shape) among the `stored` tensors.

    With `tied` the language-model head is the embedding: it need not be stored.
    """
    pieces: dict[str, Piece] = {}
    repeats: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, shape in expected.items():
        if tied and name == LM_HEAD:
            if LM_HEAD in stored:
                repeats[EMBEDDINGS] = stored[LM_HEAD]
                problems += _misshapen(stored[LM_HEAD], shape)
            continue
        piece = _fused_mlp_piece(name, shape, stored)
        if piece is not None:
            pieces[name] = piece
        elif name in stored:
            pieces[name] = Piece(stored[name], 0, shape)
            problems += _misshapen(stored[name], shape)
        else:
            problems.append(f"missing {name} {shape}")
    used = [piece.source for piece in pieces.values()] + list(repeats.values())
    left = {name: t for name, t in stored.items() if name not in {tensor.name for tensor in used}}
    zeros = [tensor for name, tensor in left.items() if _is_unused_d(name, expected)]
    problems += [f"unexpected {name}" for name in left if not _is_unused_d(name, expected)]
    kinds = ", ".join(ITEM_BYTES)
    problems += [
        f"{tensor.name} is stored as {tensor.dtype}; only {kinds} are read"
        for tensor in {tensor.name: tensor for tensor in (*used, *zeros)}.values()
        if tensor.dtype not in ITEM_BYTES
    ]
    return LoadPlan(pieces=pieces, zeros=tuple(zeros), repeats=repeats, problems=tuple(problems))


def fuse_mlp(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """The fused spelling of a model's tensors: stored name -> names whose rows it joins."""
    fused: dict[str, tuple[str, ...]] = {}
    for name in shapes:
        if name.endswith(_GATE):
            fused[name] = (name, name.removesuffix(_GATE) + _UP)
        elif not name.endswith(_UP):
            fused[name] = (name,)
    return fused


def unused_d_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the `attn.D` that belonged to the layers of a gated model."""
    return {
        name.removesuffix("A_log") + "D": shape
        for name, shape in shapes.items()
        if name.endswith(".attn.A_log")
    }


def _fused_mlp_piece(
    name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]
) -> Piece | None:
    """A half of the old fused MLP, whose gate_proj held the rows of gate_proj, then of up_proj."""
    suffix = next((suffix for suffix in (_GATE, _UP) if name.endswith(suffix)), None)
    if suffix is None or name.removesuffix(suffix) + _UP in stored:
        return None
    both = stored.get(name.removesuffix(suffix) + _GATE)
    if both is None or both.shape != (2 * shape[0], *shape[1:]):
        return None
    return Piece(both, 0 if suffix == _GATE else shape[0], shape)


def _misshapen(tensor: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    if tensor.shape == shape:
        return []
    return [f"{tensor.name} has shape {tensor.shape}, config.json implies {shape}"]


def _is_unused_d(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Early gated models saved a D per head that no computation used; it stayed at zero."""
    match = _UNUSED_D.fullmatch(name)
    return match is not None and match[1] + "A_log" in expected
