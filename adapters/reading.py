"""Reading a document without gradients, segment by segment, and going back to any place in it.

Limit: one document, batch 1; knows nothing of rollouts or losses.
"""

# T = tokens of the document, N = places, C = tokens of a segment, D = model width

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from imprint.adapters.rollout import BranchStart
from imprint.models import FastWeightModel, LoraDelta, RecurrentState


@dataclass(frozen=True, slots=True)
class Work:
    """What a generator has just done between two of its yields."""

    phase: str
    """read, rollout, forward or backward."""
    forward_tokens: int = 0
    backward_tokens: int = 0
    rollout_tokens: int = 0


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

    @property
    def num_segments(self) -> int:
        """Segments the document was read in."""
        return -(-self.tokens_T.numel() // self.segment_tokens)

    def segment_of(self, position: int) -> int:
        """The segment whose reading leads to `position`, its end included."""
        return max(position - 1, 0) // self.segment_tokens


def read_segments(
    model: FastWeightModel,
    tokens_T: Tensor,
    *,
    segment_tokens: int,
    delta: LoraDelta | None = None,
    entropy: bool = True,
    keep_states: bool = True,
    state: RecurrentState | None = None,
) -> Generator[Work, None, Reading]:
    """Read a document of one token or more, yielding after each segment; returns its Reading."""
    if tokens_T.numel() == 0:
        raise ValueError("an empty document cannot be read")
    state = model.init_state(1) if state is None else state
    segments = torch.split(tokens_T, segment_tokens)
    # what is kept lies in one block from the start: kept pieces among the large temporaries of the
    # segments would hold the heap apart, and memory would grow with the document
    states = model.init_state(len(segments)) if keep_states else None
    entropy_T = _empty_like_logits(model, tokens_T) if entropy else None
    hidden_1CD = torch.empty(0)
    for i, segment_C in enumerate(segments):
        if states is not None:
            states.write_([i], state)
        with torch.no_grad():
            hidden_1CD, state = model(segment_C.unsqueeze(0), state, delta=delta)
            if entropy_T is not None:
                first = i * segment_tokens
                entropy_T[first : first + segment_C.numel()] = model.entropies(hidden_1CD[0])
        yield Work("read", forward_tokens=segment_C.numel())
    return Reading(
        tokens_T=tokens_T,
        segment_tokens=segment_tokens,
        states=states,
        entropy_T=entropy_T,
        end=BranchStart(hidden_1CD[:, -1].clone(), state.clone()),
    )


def _empty_like_logits(model: FastWeightModel, tokens_T: Tensor) -> Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    return torch.empty(tokens_T.numel(), dtype=dtype, device=tokens_T.device)


def states_at(
    model: FastWeightModel, reading: Reading, positions_N: Tensor, *, delta: LoraDelta | None = None
) -> Generator[Work, None, BranchStart]:
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
        with torch.no_grad():
            hidden_1CD, states = model(
                reading.tokens_T[first : positions[-1]].unsqueeze(0),
                reading.states.slice(segment, segment + 1),
                delta=delta,
                stops=stops,
            )
        for row, position in enumerate(positions):
            hidden_1D = hidden_1CD[:, stops[row] - 1].clone()
            starts[position] = BranchStart(hidden_1D, states.slice(row, row + 1))
        yield Work("read", forward_tokens=stops[-1])
    return BranchStart.stack([starts[position] for position in positions_N.tolist()])
