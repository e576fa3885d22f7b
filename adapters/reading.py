"""Reading a document without gradients, segment by segment, and going back to any place in it.

Segments of several documents can be read in one batch. Limit: knows nothing of rollouts or losses.
"""

# T = tokens of the document, N = places, C = tokens of a segment, D = model width, B = documents

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import ClassVar, Self

import torch
from torch import Tensor

from imprint.adapters.calls import (
    AloneCall,
    Call,
    Calls,
    Work,
    ask,
    delta_key,
    model_key,
    stacked_deltas,
    stacked_states,
    telling_delta,
    telling_state,
)
from imprint.adapters.rollout import BranchStart
from imprint.models import FastWeightModel, LoraDelta, RecurrentState


@dataclass(frozen=True, slots=True)
class Reading:
    """A document as it was read once."""

    tokens_T: Tensor
    segment_tokens: int
    states: RecurrentState | None
    """The state before each segment, a row each; None if they were not kept."""
    entropy_T: Tensor | None
    """Entropy of the next-token distribution after each token, in nats; None if not asked for."""
    end: BranchStart
    """State and hidden state after the last token."""
    write_T: Tensor | None = None
    """How strongly each token was written into the memory, on the mean over layers, float32; None
    if not asked for."""

    @property
    def num_segments(self) -> int:
        """Segments the document was read in."""
        return -(-self.tokens_T.numel() // self.segment_tokens)

    def segment_of(self, position: int) -> int:
        """The segment whose reading leads to `position`, its end included."""
        return max(position - 1, 0) // self.segment_tokens


@dataclass(frozen=True, slots=True, eq=False)
class SegmentRead:
    """What reading one segment gave."""

    hidden_1D: Tensor
    """After its last token."""
    state: RecurrentState
    entropy_C: Tensor | None
    write_C: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class ReadSegment(Call[SegmentRead]):
    """Read a segment of one document after `state`, without gradients."""

    stage: ClassVar[int] = 0
    model: FastWeightModel
    tokens_C: Tensor
    state: RecurrentState
    delta: LoraDelta | None
    entropy: bool
    writes: bool = False

    @property
    def work(self) -> Work:
        return Work("read", forward_tokens=self.tokens_C.numel())

    @property
    def key(self) -> Hashable:
        what = (self.entropy, self.writes)
        return ("read", model_key(self.model), self.tokens_C.numel(), what, delta_key(self.delta))

    @torch.no_grad()
    def together(self, calls: Sequence[Self]) -> list[SegmentRead]:
        writes: list[Tensor] | None = [] if self.writes else None
        hidden_BCD, states = self.model(
            torch.stack([call.tokens_C for call in calls]),
            stacked_states([call.state for call in calls]),
            delta=stacked_deltas([call.delta for call in calls]),
            writes=writes,
        )
        write_BC = torch.stack(writes).mean(0) if writes else None
        # one document at a time: the logits of a segment fill the caches as it is
        entropies = [self.model.entropies(hidden_CD) for hidden_CD in hidden_BCD if self.entropy]
        return [
            SegmentRead(
                hidden_BCD[i : i + 1, -1].clone(),
                # a copy: a view would keep the states of all documents
                states if len(calls) == 1 else states.slice(i, i + 1).clone(),
                entropies[i] if self.entropy else None,
                None if write_BC is None else write_BC[i].clone(),
            )
            for i in range(len(calls))
        ]

    def witness(self, calls: Sequence[Self]) -> list[SegmentRead]:
        """What is read after something, with a delta that has learnt something."""
        like = [
            dataclasses.replace(
                call, state=telling_state(call.state), delta=telling_delta(call.delta)
            )
            for call in calls
        ]
        return like[0].together(like)


def read_segments(
    model: FastWeightModel,
    tokens_T: Tensor,
    *,
    segment_tokens: int,
    delta: LoraDelta | None = None,
    entropy: bool = True,
    keep_states: bool = True,
    state: RecurrentState | None = None,
    writes: bool = False,
) -> Calls[Reading]:
    """Read a document of one token or more, a call a segment; returns its Reading."""
    if tokens_T.numel() == 0:
        raise ValueError("an empty document cannot be read")
    state = model.init_state(1) if state is None else state
    segments = torch.split(tokens_T, segment_tokens)
    # what is kept lies in one block from the start: kept pieces among the large temporaries of the
    # segments would hold the heap apart, and memory would grow with the document
    states = model.init_state(len(segments)) if keep_states else None
    entropy_T = _empty_like_logits(model, tokens_T) if entropy else None
    written: list[Tensor] = []
    hidden_1D = torch.empty(0)
    for i, segment_C in enumerate(segments):
        if states is not None:
            states.write_([i], state)
        read = yield from ask(ReadSegment(model, segment_C, state, delta, entropy, writes))
        hidden_1D, state = read.hidden_1D, read.state
        if entropy_T is not None and read.entropy_C is not None:
            first = i * segment_tokens
            entropy_T[first : first + segment_C.numel()] = read.entropy_C
        if read.write_C is not None:
            written.append(read.write_C)
    return Reading(
        tokens_T=tokens_T,
        segment_tokens=segment_tokens,
        states=states,
        entropy_T=entropy_T,
        end=BranchStart(hidden_1D, state.clone()),
        write_T=torch.cat(written) if writes else None,
    )


def _empty_like_logits(model: FastWeightModel, tokens_T: Tensor) -> Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    return torch.empty(tokens_T.numel(), dtype=dtype, device=tokens_T.device)


def states_at(
    model: FastWeightModel, reading: Reading, positions_N: Tensor, *, delta: LoraDelta | None = None
) -> Calls[BranchStart]:
    """The starts after `positions_N` tokens, read again from the kept states, without gradients.

    Each segment is read once, as far as its last position. A position of 0 gives the state of the
    document's start and a hidden state of zeros.
    """
    assert reading.states is not None, "the reading has kept no states"
    wanted = sorted(set(positions_N.tolist()))
    starts: dict[int, BranchStart] = {}
    if wanted and wanted[0] == 0:
        zeros_1D = reading.end.hidden_ND.new_zeros(reading.end.hidden_ND.shape)
        starts[0] = BranchStart(zeros_1D, reading.states.slice(0, 1))
    for segment, group in groupby(filter(None, wanted), reading.segment_of):
        positions = list(group)
        first = segment * reading.segment_tokens
        stops = [position - first for position in positions]
        call = AloneCall(
            Work("read", forward_tokens=stops[-1]),
            partial(_read_to_stops, model, reading, segment, stops, delta),
        )
        hidden_ND, states = yield from ask(call)
        for row, position in enumerate(positions):
            starts[position] = BranchStart(hidden_ND[row : row + 1], states.slice(row, row + 1))
    return BranchStart.stack([starts[position] for position in positions_N.tolist()])


@torch.no_grad()
def _read_to_stops(
    model: FastWeightModel,
    reading: Reading,
    segment: int,
    stops: list[int],
    delta: LoraDelta | None,
) -> tuple[Tensor, RecurrentState]:
    """Hidden states [N, D] and states after so many tokens of a segment."""
    assert reading.states is not None
    first = segment * reading.segment_tokens
    hidden_1CD, states = model(
        reading.tokens_T[first : first + stops[-1]].unsqueeze(0),
        reading.states.slice(segment, segment + 1),
        delta=delta,
        stops=stops,
    )
    return hidden_1CD[0, [stop - 1 for stop in stops]], states
