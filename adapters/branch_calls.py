"""The two calls of a step's branches: roll them out, and go back through them.

Both read the branches' cues first; several studies' branches run in one batch, a delta's rows
together. Limit: is handed tokens, states and random numbers; chooses and judges nothing.
"""

# R = rows (branches) of a call, Q = its deltas, P = its states, G = rollouts per row, M = cue
# tokens, K = rollout length, S = sequences per row, D = model width

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from imprint.adapters.calls import (
    Call,
    Work,
    delta_key,
    model_key,
    stacked_deltas,
    stacked_states,
    telling_delta,
)
from imprint.adapters.config import RefineConfig
from imprint.adapters.loss import policy_losses
from imprint.adapters.rollout import Cues, Rollouts, cued_hidden, roll_out
from imprint.models import FastWeightModel, LoraDelta, RecurrentState


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """Rows that leave from `state`, each after its cue; rows and states are in order of deltas."""

    model: FastWeightModel
    cues: Cues
    state: RecurrentState
    """A row each, or fewer that are shared in order."""
    delta: LoraDelta
    """Detached."""

    @property
    def key(self) -> Hashable | None:
        """What must agree for branches to run together; None where cues differ in length."""
        if self.cues.lengths_N is not None:
            return None
        shape = (*self.cues.tokens_NM.shape, self.state.batch_size)
        return (model_key(self.model), *shape, delta_key(self.delta))


def _telling(branches: Branches) -> Branches:
    delta = telling_delta(branches.delta)
    assert delta is not None
    return dataclasses.replace(branches, delta=delta)


def _stacked(all_branches: Sequence[Branches]) -> Branches:
    first = all_branches[0]
    delta = stacked_deltas([branches.delta for branches in all_branches])
    assert delta is not None
    cues = first.cues
    if len(all_branches) > 1:
        cues = Cues(torch.cat([branches.cues.tokens_NM for branches in all_branches]), None)
    state = stacked_states([branches.state for branches in all_branches])
    return Branches(first.model, cues, state, delta)


@dataclass(frozen=True, slots=True, eq=False)
class RollOut(Call[Rollouts]):
    """Sample rollouts from branches, without gradients."""

    stage: ClassVar[int] = 1
    branches: Branches
    truth_RK: Tensor
    uniform_RGK: Tensor
    """The random numbers to sample with."""
    temperature: float
    needs_hidden: bool

    @property
    def work(self) -> Work:
        cue_tokens = self.branches.cues.num_tokens
        return Work("rollout", cue_tokens, rollout_tokens=self.uniform_RGK.numel())

    @property
    def key(self) -> Hashable | None:
        shape = self.branches.key
        if shape is None:
            return None
        return ("rollout", shape, self.uniform_RGK.shape, self.temperature, self.needs_hidden)

    @torch.no_grad()
    def together(self, calls: Sequence[Self]) -> list[Rollouts]:
        branches = _stacked([call.branches for call in calls])
        start = branches.cues.read(branches.model, branches.state, branches.delta)
        rollouts = roll_out(
            branches.model,
            start,
            torch.cat([call.truth_RK for call in calls]),
            torch.cat([call.uniform_RGK for call in calls]),
            temperature=self.temperature,
            needs_hidden=self.needs_hidden,
            delta=branches.delta,
        )
        rows = len(self.truth_RK)
        return [rollouts.slice(i * rows, (i + 1) * rows) for i in range(len(calls))]

    def witness(self, calls: Sequence[Self]) -> list[Rollouts]:
        """The rollouts with their hidden states."""
        like = [
            dataclasses.replace(call, branches=_telling(call.branches), needs_hidden=True)
            for call in calls
        ]
        return like[0].together(like)


@dataclass(frozen=True, slots=True, eq=False)
class Rolled:
    """What was rolled out of each row, and how good it was."""

    tokens_RGK: Tensor
    logprobs_RGK: Tensor | None
    """As they were drawn; None: as they are under the delta that is asked now."""
    advantages_RG: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """The gradient of a call's loss, and the loss of each row."""

    grads: list[Tensor]
    """Of the delta's parameters, in their order."""
    ntp_R: Tensor
    """Share of its delta's mean next-token loss, before lambda_ntp."""
    policy_R: Tensor | None
    """Share of its delta's mean policy loss, before lambda_rl."""


@dataclass(frozen=True, slots=True, eq=False)
class Learn(Call[Learned]):
    """Gradient of the loss over the document's continuation of each row, and over its rollouts."""

    stage: ClassVar[int] = 2
    branches: Branches
    truth_RK: Tensor
    rolled: Rolled | None
    config: RefineConfig
    num_positions: int
    """Rows over which each delta's mean is taken."""
    counts_RK: Tensor | None = None
    """Which places of a continuation count; None: all. The mean is over all places even so."""

    @property
    def work(self) -> Work:
        rows, length = self.truth_RK.shape
        group = 0 if self.rolled is None else self.rolled.tokens_RGK.shape[1]
        num_tokens = self.branches.cues.num_tokens + rows * (1 + group) * length
        return Work("backward", num_tokens, num_tokens)

    @property
    def key(self) -> Hashable | None:
        shape = self.branches.key
        if shape is None:
            return None
        rolled = None if self.rolled is None else self.rolled.tokens_RGK.shape
        return ("learn", shape, self.truth_RK.shape, rolled, self.config, self.num_positions)

    @torch.enable_grad()
    def together(self, calls: Sequence[Self]) -> list[Learned]:
        branches = _stacked([call.branches for call in calls])
        # leaves of its own: an attempt that fails leaves no part of a gradient behind
        delta = branches.delta.detach().requires_grad_()
        sequences = torch.cat([call._sequences() for call in calls])
        hidden_RSKD = cued_hidden(
            branches.model, branches.cues, branches.state, sequences, delta=delta
        )
        parts = torch.split(hidden_RSKD, len(self.truth_RK))
        # the vocabulary one study at a time: how its sums are rounded depends on the rows
        losses = [call._losses(part) for call, part in zip(calls, parts, strict=True)]
        torch.autograd.backward([loss for loss, _, _ in losses])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in delta.parameters()]
        by_call = zip(*(torch.split(g, self.branches.delta.num) for g in grads), strict=True)
        return [
            Learned([g.clone() if len(calls) > 1 else g for g in own], ntp_R, policy_R)
            for own, (_, ntp_R, policy_R) in zip(by_call, losses, strict=True)
        ]

    def witness(self, calls: Sequence[Self]) -> list[Learned]:
        """The gradients of deltas that have learnt something: they drew no rollouts, and are taken
        as if they had drawn these."""
        like = [
            dataclasses.replace(
                call,
                branches=_telling(call.branches),
                rolled=call.rolled and dataclasses.replace(call.rolled, logprobs_RGK=None),
            )
            for call in calls
        ]
        return like[0].together(like)

    def _sequences(self) -> Tensor:
        truth_R1K = self.truth_RK.unsqueeze(1)
        if self.rolled is None:
            return truth_R1K
        return torch.cat((truth_R1K, self.rolled.tokens_RGK), 1)

    def _counted(self, values_RSK: Tensor) -> Tensor:
        return values_RSK if self.counts_RK is None else values_RSK * self.counts_RK.unsqueeze(1)

    def _losses(self, hidden_RSKD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss to go back from, and its two parts by row, detached."""
        config, model = self.config, self.branches.model
        temperature = 1.0 if self.rolled is None else config.temperature
        logprobs_RSK = model.token_logprobs(hidden_RSKD, self._sequences(), temperature)
        ntp_R = -self._counted(logprobs_RSK)[:, 0].mean(-1) / self.num_positions
        loss = config.lambda_ntp * ntp_R.sum()
        if self.rolled is None:
            return loss, ntp_R.detach(), None
        logprobs_RGK, drawn_RGK = logprobs_RSK[:, 1:], self.rolled.logprobs_RGK
        losses_RGK = policy_losses(
            logprobs_RGK,
            logprobs_RGK.detach() if drawn_RGK is None else drawn_RGK,
            self.rolled.advantages_RG.unsqueeze(-1),
            config,
            compute_dtype=model.dtype,
        )
        policy_R = self._counted(losses_RGK).mean((-1, -2)) / self.num_positions
        return loss + config.lambda_rl * policy_R.sum(), ntp_R.detach(), policy_R.detach()
