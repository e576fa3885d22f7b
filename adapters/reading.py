"""Reading a document without gradients, segment by segment, and going back to any place in it.

Limit: one document, batch 1; knows nothing of rollouts or losses.
"""

# T = tokens of the document, N = places, C = tokens of a segment, D = model width

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.adapters.rollout import BranchStart
from imprint.models import DeltaNet, LoraDelta, RecurrentState, token_entropy


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
    model: DeltaNet,
    tokens_T: Tensor,
    *,
    segment_tokens: int,
    delta: LoraDelta | None = None,
    entropy: bool = True,
    keep_states: bool = True,
) -> Generator[Work, None, Reading]:
    """Read a document of one token or more, yielding after each segment; returns its Reading."""
    if tokens_T.numel() == 0:
        raise ValueError("an empty document cannot be read")
    state = model.init_state(1)
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
                entropies_C = token_entropy(model.logits(hidden_1CD[0]))
                entropy_T[first : first + segment_C.numel()] = entropies_C
        yield Work("read", forward_tokens=segment_C.numel())
    return Reading(
        tokens_T=tokens_T,
        segment_tokens=segment_tokens,
        states=states,
        entropy_T=entropy_T,
        end=BranchStart(hidden_1CD[:, -1].clone(), state.clone()),
    )


def _empty_like_logits(model: DeltaNet, tokens_T: Tensor) -> Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    return torch.empty(tokens_T.numel(), dtype=dtype, device=tokens_T.device)


def states_at(
    model: DeltaNet, reading: Reading, positions_N: Tensor, *, delta: LoraDelta | None = None
) -> Generator[Work, None, BranchStart]:
    """The starts after `positions_N` tokens, read again from the kept states, without gradients.

    Several places are read in one ragged batch of about two segments. A position of 0 gives the
    state of the document's start and a hidden state without meaning.
    """
    positions = positions_N.tolist()
    lengths = [p - reading.segment_of(p) * reading.segment_tokens for p in positions]
    order = sorted(range(len(positions)), key=lambda row: -lengths[row])
    starts: list[BranchStart] = []
    done = 0
    while done < len(order):
        longest = max(lengths[order[done]], 1)
        most = max(1, 2 * reading.segment_tokens // longest)
        # of similar length only, so that little is padding
        rows = [row for row in order[done : done + most] if 4 * lengths[row] >= 3 * longest]
        rows = rows or order[done : done + 1]
        done += len(rows)
        starts.append(_read_from_kept(model, reading, [positions[row] for row in rows], delta))
        yield Work("read", forward_tokens=sum(lengths[row] for row in rows))
    back = torch.tensor(order).argsort().to(reading.tokens_T.device)
    return BranchStart.stack(starts).select(back)


@torch.no_grad()
def _read_from_kept(
    model: DeltaNet, reading: Reading, positions: list[int], delta: LoraDelta | None
) -> BranchStart:
    assert reading.states is not None, "the reading has kept no states"
    segments = [reading.segment_of(position) for position in positions]
    device = reading.tokens_T.device
    first_N = torch.tensor(segments, device=device) * reading.segment_tokens
    lengths_N = torch.tensor(positions, device=device) - first_N
    longest = max(int(lengths_N.max()), 1)
    index_NC = first_N.unsqueeze(1) + torch.arange(longest, device=device)
    tokens_NC = reading.tokens_T[index_NC.clamp_max(reading.tokens_T.numel() - 1)]
    state = reading.states.select(segments)
    hidden_NCD, state = model(tokens_NC, state, delta=delta, lengths_B=lengths_N)
    rows = torch.arange(len(positions), device=device)
    return BranchStart(hidden_NCD[rows, lengths_N - 1], state.clone())
