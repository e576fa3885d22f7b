"""Rows at different places of their chunks: which tokens are read with which fast weights.

Plans with plain numbers; holds the fast weights of a batch while its rows step at different times.
Shapes: B = batch, T = tokens, D = model width, C = tokens of a chunk, H = heads, K = width of a
head, R = rates of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.models.architecture import Endings, LayerState
from imprint.models.attention import LARGEST_BLOCK, Rotation
from imprint.models.kernels.lact import FastWeights, step_fast_weights
from imprint.models.kernels.lact_step import StepRows
from imprint.models.lact_config import LactConfig
from imprint.models.ring import Turn


@dataclass(frozen=True, slots=True)
class Round:
    """One piece of every row, none of which crosses the end of a chunk."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    """Tokens starts[i] ... ends[i] - 1 of this read are row i's; none where both are equal."""
    closing: tuple[int, ...]
    """Rows whose chunk is complete after their piece."""
    first: int
    last: int
    """Tokens first ... last - 1 hold all the pieces."""


def plan_rounds(positions: Sequence[int], lengths: Sequence[int], size: int) -> list[Round]:
    """Cut a read of `lengths[i]` tokens after `positions[i]` ones at multiples of `size`.

    There is one round at least.
    """
    rounds: list[Round] = []
    starts = tuple(0 for _ in positions)
    while True:
        ends = tuple(
            min(start + size - (position + start) % size, length)
            for position, start, length in zip(positions, starts, lengths, strict=True)
        )
        busy = [row for row, (s, e) in enumerate(zip(starts, ends, strict=True)) if s < e]
        closing = tuple(row for row in busy if (positions[row] + ends[row]) % size == 0)
        first = min((starts[row] for row in busy), default=0)
        last = max((ends[row] for row in busy), default=0)
        rounds.append(Round(starts, ends, closing, first, last))
        if ends == tuple(lengths):
            return rounds
        starts = ends


def join_rounds(outs: Sequence[Tensor], rounds: Sequence[Round], num_tokens: int) -> Tensor:
    """[B, H, T, K] from the rounds' [B, H, last - first, K]; zeros where no row has a token."""
    edges = [0, *(part.last for part in rounds)]
    aligned = all(
        part.first == edge
        and all(s == edge for s, e in zip(part.starts, part.ends, strict=True) if s < e)
        for edge, part in zip(edges, rounds, strict=False)
    )
    if aligned:
        joined = outs[0] if len(outs) == 1 else torch.cat(list(outs), 2)
        return F.pad(joined, (0, 0, 0, num_tokens - edges[-1]))
    total = outs[0].new_zeros(*outs[0].shape[:2], num_tokens, outs[0].shape[3])
    for out, part in zip(outs, rounds, strict=True):
        token = torch.arange(part.first, part.last, device=out.device)
        start, end = (torch.tensor(x, device=out.device) for x in (part.starts, part.ends))
        mine_BT = (token >= start[:, None]) & (token < end[:, None])
        out = out * mine_BT[:, None, :, None]
        total = total + F.pad(out, (0, 0, part.first, num_tokens - part.last))
    return total


@dataclass(frozen=True, slots=True)
class LactPlan:
    """What a read is in every layer."""

    positions: Sequence[int]
    """How many tokens each row has read before."""
    rounds: Sequence[Round]
    rotation: Rotation
    """Of every token's place in its document."""
    unrolling: Turn
    """Of what the rows have read before."""
    rolling_up: Turn
    """Of what the rows of the new state have read."""
    new_positions: Tensor
    """How many tokens they have read."""
    shares_windows: bool
    """Whether rows look at windows of fewer states where these are, since their reads are short."""


@dataclass(frozen=True, slots=True)
class LactStepPlan:
    """What a step in place is in every layer."""

    at: StepRows
    rotation: Rotation
    all_stepped: bool
    """Whether every row is known to have left the initial weights."""


def complete_chunks(position_N: Tensor, rows_B: Tensor | None, size: int) -> Endings:
    """Of these rows of a pool (None: all) those whose tokens, as many as told, make whole chunks.
    Waits for the device."""
    if rows_B is None:
        rows_B = torch.arange(len(position_N), device=position_N.device)
    pairs = torch.stack((rows_B, position_N[rows_B]), 1).tolist()
    return [(row, end) for row, end in pairs if end % size == 0]


@dataclass(frozen=True, slots=True)
class Memory:
    """The fast weights of a batch and, if there is one, their momentum."""

    weights: FastWeights
    """What a state holds: means nothing for rows that have not stepped."""
    momentum: FastWeights | None
    stepped: tuple[bool, ...]
    """Rows that have left the initial weights."""

    @classmethod
    def from_state(cls, state: LayerState, stepped: Sequence[bool]) -> Self:
        """The memory in a mixer's state."""

        def named(kind: str) -> FastWeights:
            return FastWeights(*(state[f"{kind}_{name}"] for name in FastWeights._fields))

        momentum = named("momentum") if "momentum_w0" in state else None
        return cls(named("fast"), momentum, tuple(stepped))

    def to_state(self) -> LayerState:
        """The inverse of `from_state`."""
        kinds = {"fast": self.weights, "momentum": self.momentum}
        return {
            f"{kind}_{name}": tensor
            for kind, weights in kinds.items()
            if weights is not None
            for name, tensor in weights._asdict().items()
        }

    def effective(self, initial: FastWeights) -> FastWeights:
        """The weights to compute with; one row for all where none has stepped."""
        if all(self.stepped):
            return self.weights
        if not any(self.stepped):
            return initial
        stepped = torch.tensor(self.stepped, device=initial.w0.device)[:, None, None, None]
        pairs = zip(self.weights, initial, strict=True)
        return FastWeights(*(torch.where(stepped, own, start) for own, start in pairs))

    def select(self, rows: Sequence[int]) -> Memory:
        """The given rows, ascending."""
        if len(rows) == len(self.stepped):
            return self
        index = torch.tensor(rows, device=self.weights.w0.device)

        def pick(weights: FastWeights) -> FastWeights:
            return FastWeights(*(w.index_select(0, index) for w in weights))

        momentum = None if self.momentum is None else pick(self.momentum)
        return Memory(pick(self.weights), momentum, tuple(self.stepped[row] for row in rows))

    def replace(self, rows: Sequence[int], moved: Memory) -> Memory:
        """The memory after the given rows, ascending, have moved to what is given."""
        if len(rows) == len(self.stepped):
            return moved
        stepped = tuple(old or row in rows for row, old in enumerate(self.stepped))
        index = torch.tensor(rows, device=self.weights.w0.device)

        def put(old: FastWeights, new: FastWeights) -> FastWeights:
            pairs = zip(old, new, strict=True)
            return FastWeights(*(o.index_copy(0, index, n.to(o.dtype)) for o, n in pairs))

        momentum = self.momentum
        if momentum is not None and moved.momentum is not None:
            momentum = put(momentum, moved.momentum)
        return Memory(put(self.weights, moved.weights), momentum, stepped)

    def after_chunk(
        self,
        k_BHCK: Tensor,
        v_BCD: Tensor,
        rates_BCR: Tensor,
        initial: FastWeights,
        config: LactConfig,
        muon_dtype: torch.dtype,
    ) -> Self:
        """The memory after all its rows have taken a step on a chunk each."""
        heads = config.num_lact_heads
        v_BCD = v_BCD.to(k_BHCK.dtype)
        if config.qkv_silu and not config.no_v_silu:
            v_BCD = F.silu(v_BCD)
        rates_BHC3 = torch.unflatten(rates_BCR[..., : 3 * heads], -1, (heads, 3)).transpose(1, 2)
        decay_BHC = rates_BCR[..., 3 * heads :].transpose(1, 2) if config.use_momentum else None
        weights, momentum = step_fast_weights(
            self.effective(initial),
            self.momentum,
            k_BHCK,
            torch.unflatten(v_BCD, -1, (heads, -1)).transpose(1, 2),
            rates_BHC3,
            decay_BHC,
            initial.row_norms(),
            muon_dtype=muon_dtype if config.use_muon else None,
        )
        return type(self)(weights, momentum, (True,) * len(k_BHCK))


def closing_chunks(
    joined: Mapping[str, Tensor], num_new: int, part: Round, positions: Sequence[int], size: int
) -> tuple[list[int], dict[str, Tensor]]:
    """Of the rows of `part.closing` where their chunk begins, and its tokens [B, C, ...].

    `joined` has earlier tokens, and then `num_new` ones that begin at `positions`.
    """
    rows = list(part.closing)
    ends = [part.ends[row] for row in rows]
    chunks = {}
    for name, tensor in joined.items():
        first = tensor.shape[1] - num_new - size
        if len(rows) == len(positions) and len(set(ends)) == 1:
            chunks[name] = tensor[:, first + ends[0] : first + ends[0] + size]
            continue
        token_BC = torch.tensor(ends).unsqueeze(1) + torch.arange(first, first + size)
        row_B1 = torch.tensor(rows, device=tensor.device).unsqueeze(1)
        chunks[name] = tensor[row_B1, token_BC.to(tensor.device)]
    return [positions[row] + part.ends[row] - size for row in rows], chunks


def spread(tensor: Tensor, batch: int) -> Tensor:
    """Rows repeated in order until there are `batch` of them, without a copy where all are one."""
    times = batch // tensor.shape[0]
    if times == 1:
        return tensor
    if tensor.shape[0] == 1 or tensor.stride(0) == 0:
        return tensor[:1].expand(batch, *tensor.shape[1:])
    return tensor.repeat_interleave(times, 0)


def spread_memory(memories: Sequence[Memory], batch: int) -> LayerState:
    """A state's share of one memory for all rows, or of one memory for each row."""
    first = memories[0].to_state()
    if all(memory is memories[0] for memory in memories):
        return {name: spread(tensor, batch) for name, tensor in first.items()}
    states = [memory.to_state() for memory in memories]
    return {name: torch.cat([state[name] for state in states]) for name in first}


def faded_memory(
    state: LayerState, initial: FastWeights, share: float, chunk_size: int
) -> LayerState:
    """A state whose fast weights have gone back by 1 - `share` of the way to the initial ones, and
    whose momentum has a `share` left; rows that have not stepped are as they were."""
    stepped_B111 = (state["position"] >= chunk_size)[:, None, None, None]
    kept = dict(state)
    for name, start in initial._asdict().items():
        own = state[f"fast_{name}"]
        kept[f"fast_{name}"] = torch.where(stepped_B111, start.lerp(own, share), own)
        if f"momentum_{name}" in state:
            kept[f"momentum_{name}"] = state[f"momentum_{name}"] * share
    return kept


def activation_floats(config: LactConfig, num_tokens: int) -> int:
    """What a reading of `num_tokens` with gradients holds in all layers, at most.

    A step keeps its whole chunk, however little of it was read; the factors are measured.
    """
    steps = (num_tokens - 1) // config.lact_chunk_size + 1
    step_tokens = steps * config.lact_chunk_size
    matrices = 3 * config.num_lact_heads * config.fast_head_dim * config.fast_inner_dim
    copies = 3 + (1 if config.use_momentum else 0) + (21 if config.use_muon else 0)
    floats = 35 * num_tokens + 22 * step_tokens + 2 * config.kept_tokens
    floats = floats * config.hidden_size + num_tokens * (config.window_size + LARGEST_BLOCK)
    return config.num_hidden_layers * (floats + (1 + copies * steps) * matrices)
