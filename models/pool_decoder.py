"""Decoding on a pool of states, in place: one token for each of some of its rows.

On a GPU the step is replayed as a CUDA graph, captured once for each of a few batch sizes; a batch
is padded to the next of them with rows that nobody owns. Knows no slots or requests.
Graphs have been captured and replayed on a pretended GPU only: operations again on the same memory.
Shapes: B = rows of a batch, V = vocabulary.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.generate import prefill
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState

GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
"""Batch sizes that graphs are captured for. Larger batches run without."""

_WARM_UP_TOKENS = 128  # more than go token by token in `kernels/fla_delta_rule.py`
_WARM_UPS = 3  # compiles kernels and lets libraries choose theirs before a capture


DeltaShape = tuple[int, int, tuple[str, ...]]
"""Number of deltas, rank and targets."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph is captured for."""

    batch: int
    delta: DeltaShape | None


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens_B: Tensor
    rows_B: Tensor
    logits_BV: Tensor


class PoolDecoder:
    """Decodes on the rows of one pool. Row `padding_row` is nobody's and may be overwritten."""

    def __init__(
        self, model: FastWeightModel, pool: RecurrentState, *, padding_row: int = 0
    ) -> None:
        self._model, self._pool, self._padding_row = model, pool, padding_row
        self._replays = model.device.type == "cuda"
        self._graphs: dict[_Shape, _Captured] = {}
        self._buffers: dict[DeltaShape, LoraDelta] = {}
        self._held: dict[DeltaShape, LoraDelta] = {}
        self._memory: Any = None

    @torch.no_grad()
    def decode(
        self, tokens: Sequence[int], rows: Sequence[int], delta: LoraDelta | None = None
    ) -> Tensor:
        """Read token i into row `rows[i]`; returns logits [B, V], valid until the next call.

        A delta holds one for all rows or one for each. If this raises, the rows mean nothing.
        """
        size = bisect.bisect_left(GRAPH_SIZES, len(tokens))
        if self._replays and size < len(GRAPH_SIZES):
            return self._replay(GRAPH_SIZES[size], tokens, rows, delta)
        tokens_B = torch.tensor(tokens, device=self._model.device)
        rows_B = torch.tensor(rows, device=self._model.device)
        return self._model.logits(self._model.step_(tokens_B, self._pool, rows_B, delta=delta))

    def forget(self) -> None:
        """Erase what graphs hold of deltas."""
        for shape in self._held:
            for tensor in self._buffers[shape].parameters():
                tensor.zero_()
        self._held.clear()

    def _replay(
        self, size: int, tokens: Sequence[int], rows: Sequence[int], delta: LoraDelta | None
    ) -> Tensor:
        shape = _Shape(size, None)
        if delta is not None:
            num = 1 if delta.num == 1 else size
            shape = _Shape(size, (num, delta.rank, tuple(delta.a)))
        captured = self._graphs.get(shape)
        if captured is None:
            captured = self._graphs[shape] = self._capture(shape, delta)
        padding = size - len(tokens)
        captured.tokens_B.copy_(torch.tensor([*tokens, *[0] * padding]))
        captured.rows_B.copy_(torch.tensor([*rows, *[self._padding_row] * padding]))
        if delta is not None and shape.delta is not None:
            self._hold(delta, shape.delta)
        captured.graph.replay()
        self._model.end_(self._pool, captured.rows_B[: len(tokens)])
        return captured.logits_BV[: len(tokens)]

    def _capture(self, shape: _Shape, delta: LoraDelta | None) -> _Captured:
        """Record a step on the padding row. Graphs share their memory: one runs at a time."""
        model = self._model
        tokens_B = torch.zeros(shape.batch, dtype=torch.long, device=model.device)
        rows_B = torch.full_like(tokens_B, self._padding_row)
        held = None
        if delta is not None and shape.delta is not None:
            held = self._hold(delta, shape.delta)
        stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                model.logits(model.advance_(tokens_B, self._pool, rows_B, delta=held))
        torch.cuda.current_stream(model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits_BV = model.logits(model.advance_(tokens_B, self._pool, rows_B, delta=held))
        self._memory = graph.pool()
        return _Captured(graph, tokens_B, rows_B, logits_BV)

    def _hold(self, delta: LoraDelta, shape: DeltaShape) -> LoraDelta:
        """Copy deltas to where graphs of their shape read them, unless they are there already."""
        if shape not in self._buffers:
            a, b = (
                {name: t.new_zeros(shape[0], *t.shape[1:]) for name, t in side.items()}
                for side in (delta.a, delta.b)
            )
            self._buffers[shape] = LoraDelta(a, b)
        buffers = self._buffers[shape]
        if self._held.get(shape) is not delta:
            self._held.pop(shape, None)  # in case that a copy breaks off
            for mine, theirs in zip(buffers.parameters(), delta.parameters(), strict=True):
                mine[: theirs.shape[0]].copy_(theirs)
            self._held[shape] = delta
        return buffers


def warm_up(model: FastWeightModel) -> None:
    """Read and decode once, so that kernels are checked and compiled before anybody waits."""
    tokens_1T = torch.zeros(1, _WARM_UP_TOKENS, dtype=torch.long, device=model.device)
    _, state = prefill(model, tokens_1T)
    PoolDecoder(model, state).decode([0], [0])
