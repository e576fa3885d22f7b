"""A REFINE step for query-side deltas (scope query_lora): its cost knows no document length.

The document has been read once with the base weights. Branches leave from its end (recall) or from
places inside it (continue), the delta is applied to their cues and tokens only, and the next-token
loss is over the branches' own continuations. Q deltas, one per question, share a batch; each has
its own positions, random stream, mean loss and gradient. Limit: no gradient reaches the document.
"""

# Q = deltas, N = positions of each, R = rows of one batch

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imprint.adapters.branch_calls import Branches, Learn, RollOut
from imprint.adapters.calls import Calls, ask
from imprint.adapters.config import RefineConfig
from imprint.adapters.policy import BranchSet, StepResult, recall_mask, row_batches
from imprint.adapters.reading import Reading, states_at
from imprint.adapters.rollout import Cues
from imprint.adapters.similarity import Similarity
from imprint.models import FastWeightModel, LoraDelta, RecurrentState


def query_step(
    model: FastWeightModel,
    tokens_T: Tensor,
    positions_QN: Tensor,
    config: RefineConfig,
    *,
    delta: LoraDelta,
    end_state: RecurrentState,
    seeds: Sequence[int],
    step: int,
    reading: Reading | None = None,
    entropy_T: Tensor | None = None,
    similarity: Similarity | None = None,
) -> Calls[StepResult]:
    """Accumulate in `delta` the gradient of the sum over deltas of each one's own mean loss.

    `end_state` [1 row] is the document's end under the base weights. `reading`, with its states
    kept, is needed where branches continue, `entropy_T` (of the reading) with `min_entropy`,
    `similarity` for the reward `semantic`. Works through as many deltas at a time as fit two
    segments' worth of tokens.
    """
    num_deltas, num_positions = positions_QN.shape
    if num_positions == 0 or num_deltas != delta.num or num_deltas != len(seeds):
        raise ValueError(
            f"positions {tuple(positions_QN.shape)} for {delta.num} deltas and {len(seeds)} seeds"
        )
    step_branches = _QueryBranches(
        BranchSet(
            model,
            config,
            tokens_T,
            positions_QN,
            seeds=seeds,
            step=step,
            entropy_T=entropy_T,
            similarity=similarity,
        ),
        tokens_T,
        recall_mask(num_positions, config, step),
        delta,
        end_state,
        reading,
    )
    yield from step_branches.run()
    return step_branches.branches.result(step_branches.recall_N)


class _QueryBranches:
    """The branches of all deltas, in batches: several whole deltas, or parts of a single one."""

    def __init__(
        self,
        branches: BranchSet,
        tokens_T: Tensor,
        recall_N: Tensor,
        delta: LoraDelta,
        end_state: RecurrentState,
        reading: Reading | None,
    ) -> None:
        self.branches, self.config, self.model = branches, branches.config, branches.model
        self.tokens_T, self.recall_N, self.delta = tokens_T, recall_N, delta
        self.end_state, self.reading = end_state, reading
        self.rolls = self.config.lambda_rl > 0

    def run(self) -> Calls[None]:
        """Sample, judge and go backward, batch by batch."""
        rows_QN = torch.arange(self.branches.positions_QN.numel())
        rows_QN = rows_QN.view(-1, self.branches.num_positions)
        num_positions, at_once = rows_QN.shape[1], self.config.branches_at_once
        whole = row_batches(rows_QN, max(1, at_once // num_positions))
        batches = [part_QN.flatten() for part_QN in whole]
        if at_once < num_positions:
            batches = [part_R for rows_R in batches for part_R in row_batches(rows_R, at_once)]
        if self.rolls and self.branches.waits_for_all:
            for rows_R in batches:
                yield from self._sample(rows_R)
            self.branches.settle()
        for rows_R in batches:
            if self.rolls and not self.branches.waits_for_all:
                yield from self._sample(rows_R)
            yield from self._learn(rows_R)

    def _sample(self, rows_R: Tensor) -> Calls[None]:
        branches = yield from self._branches(rows_R)
        call = RollOut(
            branches,
            self.branches.truth_BK[rows_R],
            self.branches.uniforms(rows_R),
            self.config.temperature,
            self.config.needs_hidden,
        )
        self.branches.take(rows_R, (yield from ask(call)))

    def _learn(self, rows_R: Tensor) -> Calls[None]:
        branches = yield from self._branches(rows_R)
        counts_BK = self.branches.counts_BK
        call = Learn(
            branches,
            self.branches.truth_BK[rows_R],
            self.branches.rolled(rows_R) if self.rolls else None,
            self.config,
            self.branches.num_positions,
            None if counts_BK is None else counts_BK[rows_R],
        )
        learned = yield from ask(call)
        self.branches.add_losses(rows_R, learned)
        first, last = self._deltas(rows_R)
        for parameter, grad in zip(self.delta.parameters(), learned.grads, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad[first:last] += grad

    def _deltas(self, rows_R: Tensor) -> tuple[int, int]:
        num = self.branches.num_positions
        return int(rows_R[0]) // num, int(rows_R[-1]) // num + 1

    def _branches(self, rows_R: Tensor) -> Calls[Branches]:
        state = yield from self._leave(rows_R)
        positions_R = self.branches.positions_QN.flatten()[rows_R]
        cues = Cues.before(self.tokens_T, positions_R, self.config.cue_tokens)
        return Branches(self.model, cues, state, self.delta.detach().slice(*self._deltas(rows_R)))

    def _leave(self, rows_R: Tensor) -> Calls[RecurrentState]:
        """The states from which the cues are read: one row per branch, or one shared by all."""
        recall_R = self.recall_N[rows_R % self.branches.num_positions]
        num_recalls = int(recall_R.sum())
        if num_recalls == len(rows_R):
            return self.end_state
        if self.reading is None or self.reading.states is None:
            raise ValueError("branches that continue need a reading with its states kept")
        positions_R = self.branches.positions_QN.flatten()[rows_R]
        leave_R = (positions_R - self.config.cue_tokens).clamp_min(0)
        inside = yield from states_at(self.model, self.reading, leave_R[~recall_R])
        if num_recalls == 0:
            return inside.state
        both = RecurrentState.stack([self.end_state.fork(num_recalls), inside.state])
        order = torch.cat((recall_R.nonzero().flatten(), (~recall_R).nonzero().flatten()))
        return both.select(order.argsort())
