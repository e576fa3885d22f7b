"""A REFINE step for query-side deltas (scope query_lora): its cost knows no document length.

The document has been read once with the base weights. Branches leave from its end (recall) or from
places inside it (continue), the delta is applied to their cues and tokens only, and the next-token
loss is over the branches' own continuations. Q deltas, one per question, share a batch; each has
its own positions, random stream, mean loss and gradient. Limit: no gradient reaches the document.
"""

# Q = deltas, N = positions of each, R = rows of one batch

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from imprint.adapters.config import RefineConfig
from imprint.adapters.policy import BranchSet, StepResult, recall_mask
from imprint.adapters.reading import Reading, Work, states_at
from imprint.adapters.rollout import BranchStart, read_cues
from imprint.models import DeltaNet, LoraDelta, RecurrentState


def query_step(
    model: DeltaNet,
    tokens_T: Tensor,
    positions_QN: Tensor,
    config: RefineConfig,
    *,
    delta: LoraDelta,
    end_state: RecurrentState,
    seeds: Sequence[int],
    step: int,
    reading: Reading | None = None,
) -> Generator[Work, None, StepResult]:
    """Accumulate in `delta` the gradient of the sum over deltas of each one's own mean loss.

    `end_state` [1 row] is the document's end under the base weights. `reading`, with its states
    kept, is needed where branches continue. Works through as many deltas at a time as fit two
    segments' worth of tokens, and yields between quanta.
    """
    num_deltas, num_positions = positions_QN.shape
    if num_positions == 0 or num_deltas != delta.num or num_deltas != len(seeds):
        raise ValueError(
            f"positions {tuple(positions_QN.shape)} for {delta.num} deltas and {len(seeds)} seeds"
        )
    branches = BranchSet(model, config, tokens_T, positions_QN, seeds=seeds, step=step)
    recall_N = recall_mask(num_positions, config, step)
    sequences = 1 + (config.group_size if config.lambda_rl > 0 else 0)
    row_tokens = config.cue_tokens + sequences * config.rollout_length
    at_once = max(1, 2 * config.segment_tokens // (num_positions * row_tokens))
    for first in range(0, num_deltas, at_once):
        last = min(first + at_once, num_deltas)
        rows_R = torch.arange(first * num_positions, last * num_positions)
        states = yield from _leave(
            model, config, positions_QN[first:last], recall_N, end_state, reading
        )
        with torch.enable_grad():
            part = delta.slice(first, last) if last - first < num_deltas else delta
        yield from _one_batch(branches, tokens_T, rows_R, states, part)
    return branches.result(recall_N)


def _one_batch(
    branches: BranchSet,
    tokens_T: Tensor,
    rows_R: Tensor,
    states: RecurrentState,
    delta: LoraDelta,
) -> Generator[Work, None, None]:
    """Cues, rollouts, losses and backward of the rows of whole deltas."""
    config, model = branches.config, branches.model
    positions_R = branches.positions_QN.flatten()[rows_R]
    with torch.enable_grad():
        start = read_cues(model, tokens_T, positions_R, states, config.cue_tokens, delta=delta)
    num_cues = len(rows_R) * config.cue_tokens
    num_sequences = 1
    yield Work("forward", forward_tokens=num_cues)
    if config.lambda_rl > 0:
        num_sequences += config.group_size
        num_rolled = branches.sample(rows_R, start, delta)
        if branches.waits_for_all:
            branches.settle()
        yield Work("rollout", rollout_tokens=num_rolled)
    with torch.enable_grad():
        loss = branches.loss_with_truth(rows_R, start, delta)
    torch.autograd.backward([loss])
    num_read = len(rows_R) * num_sequences * config.rollout_length
    yield Work("backward", forward_tokens=num_read, backward_tokens=num_cues + num_read)


def _leave(
    model: DeltaNet,
    config: RefineConfig,
    positions_QN: Tensor,
    recall_N: Tensor,
    end_state: RecurrentState,
    reading: Reading | None,
) -> Generator[Work, None, RecurrentState]:
    """The states from which the cues are read, one row per branch."""
    recall_R = recall_N.repeat(len(positions_QN))
    if bool(recall_R.all()):
        return end_state.fork(recall_R.numel())
    if reading is None or not reading.states:
        raise ValueError("branches that continue need a reading with its states kept")
    positions_R = positions_QN.flatten()
    leave_R = (positions_R - config.cue_tokens).clamp_min(0)
    inside: BranchStart = yield from states_at(model, reading, leave_R[~recall_R])
    num_recalls = int(recall_R.sum())
    if num_recalls == 0:
        return inside.state
    both = RecurrentState.stack([end_state.fork(num_recalls), inside.state])
    order = torch.cat((recall_R.nonzero().flatten(), (~recall_R).nonzero().flatten()))
    return both.select(order.argsort())
