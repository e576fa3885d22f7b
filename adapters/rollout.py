"""Branches: where they start, what they roll out, and how likely that was.

Rows of a batch are branches in groups of equal size per delta, so Q deltas can roll out at once.
Random numbers are pure functions of (seed, step, branch, rollout, token): a rollout does not depend
on what else is in the batch. Limit: knows states and tokens; nothing of rewards or losses.
"""

# Q = deltas, N = branches (rows, Q divides N), G = rollouts per branch, R = sequences per branch,
# K = rollout length, M = cue tokens, D = model width, V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from imprint.adapters.config import RefineConfig
from imprint.models import FastWeightModel, LoraDelta, RecurrentState, counter_uniform


@dataclass(frozen=True, slots=True)
class BranchStart:
    """Where branches leave: the state after the last token read, and that token's hidden state."""

    hidden_ND: Tensor
    state: RecurrentState

    @classmethod
    def stack(cls, starts: Sequence[BranchStart]) -> BranchStart:
        """The rows of all `starts`, in order."""
        hidden_ND = torch.cat([start.hidden_ND for start in starts])
        return cls(hidden_ND, RecurrentState.stack([start.state for start in starts]))

    def select(self, rows: Tensor) -> BranchStart:
        """The given rows; differentiable."""
        return BranchStart(self.hidden_ND.index_select(0, rows), self.state.select(rows))

    def detach(self) -> BranchStart:
        """The same values without a graph."""
        return BranchStart(self.hidden_ND.detach(), self.state.detach())


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What was sampled, without gradients."""

    tokens_NGK: Tensor
    logprobs_NGK: Tensor
    """Log-probability of each sampled token."""
    truth_logprobs_NGK: Tensor
    """Log-probability of the document's token at the same place, after the rollout so far."""
    hidden_NGKD: Tensor | None
    """Hidden states after each sampled token; None unless the reward compares them."""
    truth_hidden_NKD: Tensor | None
    """Hidden states after each token of the document's continuation; None likewise."""

    def slice(self, start: int, stop: int) -> Rollouts:
        """The rollouts of branches start ... stop - 1, as views."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Rollouts(
            self.tokens_NGK[start:stop],
            self.logprobs_NGK[start:stop],
            self.truth_logprobs_NGK[start:stop],
            part(self.hidden_NGKD),
            part(self.truth_hidden_NKD),
        )


def continuations(tokens_T: Tensor, positions_N: Tensor, length: int) -> Tensor:
    """The document's next `length` tokens after each position: [N, K]."""
    offsets = torch.arange(length, device=tokens_T.device)
    return tokens_T[positions_N.to(tokens_T.device).unsqueeze(1) + offsets]


def uncertain_places(
    entropy_T: Tensor, positions_N: Tensor, length: int, min_entropy: float
) -> Tensor:
    """Which of the next `length` tokens the reading expected with that entropy: bool [N, K].

    `entropy_T` is of the distribution after each token, in nats.
    """
    offsets = torch.arange(length, device=entropy_T.device)
    before_NK = positions_N.to(entropy_T.device).unsqueeze(1) + offsets - 1
    return entropy_T[before_NK.clamp_min(0)] >= min_entropy


@dataclass(frozen=True, slots=True)
class Cues:
    """The document tokens before each of some positions: what a recalling branch is given."""

    tokens_NM: Tensor
    lengths_N: Tensor | None
    """Where they differ; rows are then padded at their end."""

    @classmethod
    def before(cls, tokens_T: Tensor, positions_N: Tensor, cue_tokens: int) -> Cues:
        """Up to `cue_tokens` tokens before each position.

        Positions are at least 1; those with fewer tokens before them get a shorter cue.
        """
        positions_N = positions_N.to(tokens_T.device)
        lengths_N = positions_N.clamp_max(cue_tokens)
        longest, shortest = int(lengths_N.max()), int(lengths_N.min())
        offsets_M = torch.arange(longest, device=tokens_T.device)
        index_NM = (positions_N - lengths_N).unsqueeze(1) + offsets_M
        tokens_NM = tokens_T[index_NM.clamp_max(tokens_T.numel() - 1)]
        return cls(tokens_NM, None if longest == shortest else lengths_N)

    def followed_by(self, tokens_NK: Tensor) -> Cues:
        """Each cue with K more tokens behind it."""
        if self.lengths_N is None:
            return Cues(torch.cat((self.tokens_NM, tokens_NK), 1), None)
        wide_NT = F.pad(self.tokens_NM, (0, tokens_NK.shape[1]))
        index_NK = self.lengths_N.unsqueeze(1) + torch.arange(
            tokens_NK.shape[1], device=wide_NT.device
        )
        return Cues(wide_NT.scatter(1, index_NK, tokens_NK), self.lengths_N + tokens_NK.shape[1])

    def last(self, hidden_NMD: Tensor, length: int) -> Tensor:
        """Of what was read of them, the last `length` hidden states of each row."""
        if self.lengths_N is None:
            return hidden_NMD[:, -length:]
        index_NK = self.lengths_N.unsqueeze(1) + torch.arange(-length, 0, device=hidden_NMD.device)
        rows_N = torch.arange(len(index_NK), device=hidden_NMD.device)
        return hidden_NMD[rows_N.unsqueeze(1), index_NK]

    @property
    def num_tokens(self) -> int:
        """Tokens to read, padding included."""
        return self.tokens_NM.numel()

    def read(
        self, model: FastWeightModel, state: RecurrentState, delta: LoraDelta | None
    ) -> BranchStart:
        """Read them from `state`, of a row per position, or fewer that are shared in order."""
        hidden_NMD, state = model(self.tokens_NM, state, delta=delta, lengths_B=self.lengths_N)
        return BranchStart(self.last(hidden_NMD, 1)[:, 0], state)


def read_cues(
    model: FastWeightModel,
    tokens_T: Tensor,
    positions_N: Tensor,
    state: RecurrentState,
    cue_tokens: int,
    *,
    delta: LoraDelta | None = None,
) -> BranchStart:
    """Read the cues before each position from `state`; see `Cues`."""
    return Cues.before(tokens_T, positions_N, cue_tokens).read(model, state, delta)


def rollout_uniforms(
    seeds: Sequence[int], step: int, branches_N: Tensor, group_size: int, length: int
) -> Tensor:
    """Uniform numbers [N, G, K]; the rows are split evenly over the seeds, in order."""
    branch = branches_N.cpu().view(len(seeds), -1, 1, 1)
    rollout = torch.arange(group_size).view(1, -1, 1)
    token = torch.arange(length).view(1, 1, -1)
    counters = (step << 40) + (branch << 20) + (rollout << 10) + token
    streams = [counter_uniform(seed, counters[i]) for i, seed in enumerate(seeds)]
    return torch.cat(streams)


def _invert(logprobs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One token per row from the whole distribution, by its cumulative sum: [R]."""
    mass_RV = logprobs_RV.double().exp().cumsum(-1)
    point_R1 = uniform_R.unsqueeze(1) * mass_RV[:, -1:]
    return torch.searchsorted(mass_RV, point_R1).squeeze(1).clamp_max(mass_RV.shape[1] - 1)


@torch.no_grad()
def sample_rollouts(
    model: FastWeightModel,
    start: BranchStart,
    truth_NK: Tensor,
    config: RefineConfig,
    *,
    seeds: Sequence[int],
    step: int,
    branches_N: Tensor,
    delta: LoraDelta | None = None,
) -> Rollouts:
    """Sample `group_size` rollouts of exactly K tokens from every branch; no top-p, no early stop.

    `branches_N` numbers the branches of each seed and so fixes their random streams.
    """
    length, group = truth_NK.shape[1], config.group_size
    return roll_out(
        model,
        start,
        truth_NK,
        rollout_uniforms(seeds, step, branches_N, group, length).to(truth_NK.device),
        temperature=config.temperature,
        needs_hidden=config.needs_hidden,
        delta=delta,
    )


@torch.no_grad()
def roll_out(
    model: FastWeightModel,
    start: BranchStart,
    truth_NK: Tensor,
    uniform_NGK: Tensor,
    *,
    temperature: float,
    needs_hidden: bool,
    delta: LoraDelta | None,
) -> Rollouts:
    """Sample G rollouts of K tokens from every branch, with the given random numbers."""
    num, group, length = uniform_NGK.shape
    uniform_RK = uniform_NGK.reshape(num * group, length)
    truth_RK = truth_NK.repeat_interleave(group, 0)
    start = start.detach()
    # every sequence a state of its own, written in place: nobody else sees them
    hidden_RD, pool = start.hidden_ND.repeat_interleave(group, 0), start.state.fork(group)
    tokens, logprobs, truths, hiddens = [], [], [], []
    for j in range(length):
        logits_RV = model.logits(hidden_RD)
        logprobs_RV = (logits_RV / temperature).log_softmax(-1)
        token_R = _invert(logprobs_RV, uniform_RK[:, j])
        tokens.append(token_R)
        logprobs.append(logprobs_RV.gather(1, token_R.unsqueeze(1)).squeeze(1))
        truths.append(logprobs_RV.gather(1, truth_RK[:, j : j + 1]).squeeze(1))
        if j + 1 < length or needs_hidden:
            hidden_RD = model.step_(token_R, pool, delta=delta)
            hiddens.append(hidden_RD)

    def grouped(columns: list[Tensor]) -> Tensor:
        stacked = torch.stack(columns, 1)
        return stacked.view(num, group, *stacked.shape[1:])

    truth_hidden = None
    if needs_hidden:
        truth_hidden, _ = model(truth_NK, start.state, delta=delta, keep_state=False)
    return Rollouts(
        grouped(tokens),
        grouped(logprobs),
        grouped(truths),
        grouped(hiddens) if needs_hidden else None,
        truth_hidden,
    )


def branch_logprobs(
    model: FastWeightModel,
    start: BranchStart,
    sequences_NRK: Tensor,
    *,
    temperature: float = 1.0,
    delta: LoraDelta | None = None,
) -> Tensor:
    """Teacher-forced log-probabilities [N, R, K] of R sequences per branch; differentiable."""
    hidden_NRKD = sequence_hidden(model, start, sequences_NRK, delta=delta)
    return model.token_logprobs(hidden_NRKD, sequences_NRK, temperature)


def sequence_hidden(
    model: FastWeightModel,
    start: BranchStart,
    sequences_NRK: Tensor,
    *,
    delta: LoraDelta | None = None,
) -> Tensor:
    """Hidden states [N, R, K, D] from which each token of the sequences is predicted."""
    num, per_branch, length = sequences_NRK.shape
    hidden_SKD = start.hidden_ND.repeat_interleave(per_branch, 0).unsqueeze(1)
    if length > 1:
        read = sequences_NRK[:, :, :-1].reshape(num * per_branch, length - 1)
        rest_SKD, _ = model(read, start.state, delta=delta, keep_state=False)
        hidden_SKD = torch.cat((hidden_SKD, rest_SKD), 1)
    return hidden_SKD.view(num, per_branch, length, -1)


def cued_hidden(
    model: FastWeightModel,
    cues: Cues,
    state: RecurrentState,
    sequences_NRK: Tensor,
    *,
    delta: LoraDelta | None = None,
) -> Tensor:
    """`sequence_hidden` of branches that leave after cues, which are read from `state`.

    With one sequence a branch, cue and sequence are read at once, and no state lies between.
    """
    if sequences_NRK.shape[1] > 1:
        return sequence_hidden(model, cues.read(model, state, delta), sequences_NRK, delta=delta)
    rows = cues.followed_by(sequences_NRK[:, 0, :-1])
    hidden_NTD, _ = model(
        rows.tokens_NM, state, delta=delta, lengths_B=rows.lengths_N, keep_state=False
    )
    return rows.last(hidden_NTD, sequences_NRK.shape[2]).unsqueeze(1)
