"""One trunk, many branches: a REFINE step over a document with exact gradients in constant memory.

Every prefix of a document is a prefix of the others, so the document is read once without
gradients, keeping the state before each segment, and once more with gradients, segment by segment
from the end; a branch's gradient flows into the state it left from, and from there through the
document. What grows with the document is one kept state per segment. Limit: one document; adds to
`.grad` of whatever requires gradients (a delta, a start, weights) and optimizes nothing.
"""

# T = tokens of the document, N = positions, R = branches of one segment, D = model width

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from imprint.adapters.calls import AloneCall, Calls, Work, ask
from imprint.adapters.config import RefineConfig
from imprint.adapters.policy import BranchSet, StepResult, recall_mask, row_batches
from imprint.adapters.reading import Reading, read_segments, states_at
from imprint.adapters.rollout import BranchStart, read_cues
from imprint.adapters.selection import select_positions
from imprint.adapters.similarity import Similarity
from imprint.models import FastWeightModel, LoraDelta, RecurrentState

Grads = list[Tensor | None]


def trunk_step(
    model: FastWeightModel,
    tokens_T: Tensor,
    config: RefineConfig,
    *,
    delta: LoraDelta | None,
    seed: int,
    step: int,
    excluded_T: Tensor | None = None,
    positions_N: Tensor | None = None,
    start: RecurrentState | None = None,
    similarity: Similarity | None = None,
) -> Calls[StepResult]:
    """Accumulate the gradient of lambda_rl * L_NSP + lambda_ntp * L_NTP.

    `delta` is applied to the document and to its branches (scope lora). The document is read from
    `start` [1 row], the model's own if not given; it gets a gradient, too (scope state). Positions
    are selected as the config says unless given; a document too short for any gets the next-token
    loss alone. Where a group is a position, its rollouts are drawn when its segment is read the
    second time; a group that spans the document (one rollout each) needs all rewards first: its
    rollouts are drawn before.
    """
    reading, positions_N = yield from _read_and_select(
        model, tokens_T, config, delta, seed, step, excluded_T, positions_N, start
    )
    branches = BranchSet(
        model,
        config,
        tokens_T,
        positions_N.unsqueeze(0),
        seeds=[seed],
        step=step,
        entropy_T=reading.entropy_T,
        similarity=similarity,
    )
    recall_N = recall_mask(len(positions_N), config, step)
    walk = _Backward(model, config, reading, branches, recall_N, delta, start)
    if branches.waits_for_all and len(positions_N):
        yield from walk.sample_all()
    state_grads = yield from walk.recalls()
    for segment in range(reading.num_segments - 1, -1, -1):
        state_grads = yield from walk.segment(segment, state_grads)
    return dataclasses.replace(
        branches.result(recall_N), entropy_T=reading.entropy_T, end=reading.end
    )


def _read_and_select(
    model: FastWeightModel,
    tokens_T: Tensor,
    config: RefineConfig,
    delta: LoraDelta | None,
    seed: int,
    step: int,
    excluded_T: Tensor | None,
    positions_N: Tensor | None,
    start: RecurrentState | None,
) -> Calls[tuple[Reading, Tensor]]:
    """Pass one, without gradients, and the positions of the branches, ascending; none where no
    rollouts are drawn."""
    drawn = config.lambda_rl > 0
    selects = config.selection != "uniform" and positions_N is None
    scored = drawn and (selects or config.min_entropy > 0)
    reading = yield from read_segments(
        model,
        tokens_T,
        segment_tokens=config.segment_tokens,
        delta=delta,
        entropy=scored,
        writes=positions_N is None and config.selection == "write",
        state=start,
    )
    if positions_N is None:
        entropy_T = reading.entropy_T if scored else torch.zeros(tokens_T.numel())
        assert entropy_T is not None
        positions_N = select_positions(
            entropy_T,
            config,
            seed=seed,
            step=step,
            excluded_T=excluded_T,
            write_T=reading.write_T,
        )
    return reading, positions_N.sort().values if drawn else positions_N[:0]


class _Backward:
    """Pass two: the branches at the document's end, then the segments in reverse order."""

    def __init__(
        self,
        model: FastWeightModel,
        config: RefineConfig,
        reading: Reading,
        branches: BranchSet,
        recall_N: Tensor,
        delta: LoraDelta | None,
        start: RecurrentState | None,
    ) -> None:
        self.model, self.config, self.reading = model, config, reading
        self.branches, self.delta, self.start = branches, delta, start
        self.positions_N = branches.positions_QN[0]
        self.recalling = recall_N.nonzero().flatten()
        self.leaving = (~recall_N).nonzero().flatten()

    def sample_all(self) -> Calls[None]:
        """Roll out every branch from states that are read again, then settle the advantages."""
        for rows_R in row_batches(self.recalling, self.config.branches_at_once):
            start = yield from self._cues(self.reading.end.state, rows_R, graded=False)
            yield from self._sample(rows_R, start)
        for rows_R in row_batches(self.leaving, self.config.branches_at_once):
            start = yield from states_at(
                self.model, self.reading, self.positions_N[rows_R], delta=self.delta
            )
            yield from self._sample(rows_R, start)
        self.branches.settle()

    def recalls(self) -> Calls[Grads | None]:
        """Backward through the branches that leave at the end; the gradient of the end state."""
        leaf = self.reading.end.state.leaf()
        carried = False
        recalling = self.branches.with_signal(self.recalling)
        for rows_R in row_batches(recalling, self.config.branches_at_once):
            num_cues = len(rows_R) * self.config.cue_tokens
            start = yield from self._cues(leaf, rows_R, graded=True)
            kept_R, start = yield from self._sampled(rows_R, start)
            if len(kept_R):
                carried = True
                yield from ask(
                    AloneCall(
                        Work("backward", backward_tokens=num_cues + self._branch_tokens(kept_R)),
                        partial(self._back_through_branches, kept_R, start),
                    )
                )
        return leaf.grads() if carried else None

    def segment(self, index: int, state_grads: Grads | None) -> Calls[Grads | None]:
        """Read one segment again and go back through it; the gradient of the state before it."""
        first = index * self.config.segment_tokens
        last = min(first + self.config.segment_tokens, self.reading.tokens_T.numel())
        places = self.positions_N[self.leaving]
        inside = self.leaving[(places > first) & (places <= last)]
        rows_R = self.branches.with_signal(inside)
        if state_grads is None and self.config.lambda_ntp == 0 and not len(rows_R):
            return None
        assert self.reading.states is not None
        state = self.reading.states.slice(index, index + 1)
        # no segment comes before the first: from there the gradient goes on into what was given
        leaf = state.leaf() if index else (self.start if self.start is not None else state)
        read = AloneCall(
            Work("forward", forward_tokens=last - first),
            partial(self._read, first, last, rows_R, leaf),
        )
        hidden_CD, start, end_state = yield from ask(read)
        if len(rows_R):
            rows_R, start = yield from self._sampled(rows_R, start)
        back = AloneCall(
            Work("backward", backward_tokens=last - first + self._branch_tokens(rows_R)),
            partial(self._back, first, last, hidden_CD, rows_R, start, end_state, state_grads),
        )
        yield from ask(back)
        return leaf.grads() if index else None

    @torch.enable_grad()
    def _back(
        self,
        first: int,
        last: int,
        hidden_CD: Tensor,
        rows_R: Tensor,
        start: BranchStart,
        end_state: RecurrentState,
        state_grads: Grads | None,
    ) -> None:
        losses: list[Tensor] = []
        if len(rows_R):
            losses.append(self.branches.loss(rows_R, start, self.delta))
        if self.config.lambda_ntp > 0:
            losses.append(self._next_token_loss(first, last, hidden_CD))
        roots: list[Tensor] = [*losses, *(end_state.tensors() if state_grads is not None else [])]
        _backward(roots, [*([None] * len(losses)), *(state_grads or [])])

    @torch.enable_grad()
    def _back_through_branches(self, rows_R: Tensor, start: BranchStart) -> None:
        _backward([self.branches.loss(rows_R, start, self.delta)], [None])

    def _branch_tokens(self, rows_R: Tensor) -> int:
        return len(rows_R) * self.config.group_size * self.config.rollout_length

    def _cues(
        self, end_state: RecurrentState, rows_R: Tensor, *, graded: bool
    ) -> Calls[BranchStart]:
        def read() -> BranchStart:
            with torch.set_grad_enabled(graded):
                return read_cues(
                    self.model,
                    self.reading.tokens_T,
                    self.positions_N[rows_R],
                    end_state,
                    self.config.cue_tokens,
                    delta=self.delta,
                )

        num_tokens = len(rows_R) * self.config.cue_tokens
        return ask(AloneCall(Work("forward", forward_tokens=num_tokens), read))

    def _sample(self, rows_R: Tensor, start: BranchStart) -> Calls[None]:
        work = Work("rollout", rollout_tokens=self._branch_tokens(rows_R))
        return ask(AloneCall(work, partial(self.branches.sample, rows_R, start, self.delta)))

    def _sampled(self, rows_R: Tensor, start: BranchStart) -> Calls[tuple[Tensor, BranchStart]]:
        """Sample what has not been sampled; the rows with a signal, and where they start."""
        if not bool(self.branches.sampled_B[rows_R].all()):
            yield from self._sample(rows_R, start)
            kept = (self.branches.advantages_BG[rows_R] != 0).any(-1).nonzero().flatten()
            if len(kept) < len(rows_R):
                with torch.enable_grad():
                    rows_R, start = rows_R[kept.cpu()], start.select(kept)
        return rows_R, start

    @torch.enable_grad()
    def _read(
        self, first: int, last: int, rows_R: Tensor, state: RecurrentState
    ) -> tuple[Tensor, BranchStart, RecurrentState]:
        """Read tokens first ... last - 1: hidden states, where branches leave, the state after."""
        stops = [position - first for position in self.positions_N[rows_R].tolist()]
        segment = self.reading.tokens_T[first:last].unsqueeze(0)
        hidden_1CD, states = self.model(
            segment, state, delta=self.delta, stops=[*stops, last - first]
        )
        places = torch.tensor(stops, dtype=torch.long, device=segment.device)
        start = BranchStart(hidden_1CD[0, places - 1], states.slice(0, len(stops)))
        return hidden_1CD[0], start, states.slice(len(stops), len(stops) + 1)

    def _next_token_loss(self, first: int, last: int, hidden_CD: Tensor) -> Tensor:
        """lambda_ntp * this segment's share of the document's mean next-token loss."""
        tokens_T = self.reading.tokens_T
        targets = tokens_T[first + 1 : last + 1]
        logprobs_C = self.model.token_logprobs(hidden_CD[: len(targets)], targets)
        share = -logprobs_C.sum() / max(tokens_T.numel() - 1, 1)
        self.branches.ntp_loss_Q += share.detach().double().cpu()
        return self.config.lambda_ntp * share


def _backward(roots: list[Tensor], grads: Grads) -> None:
    """`torch.autograd.backward` over those roots that depend on something trained."""
    pairs = [
        (root, grad)
        for root, grad in zip(roots, grads, strict=True)
        if root.requires_grad and not (root.dim() and grad is None)
    ]
    if pairs:
        torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])
