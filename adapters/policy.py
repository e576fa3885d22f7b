"""The branches of one step: sample them, judge them, and turn them into losses.

Shared by the trunk (branches leave inside a document that is being read), which samples from starts
of its own, and by query-side deltas, which use calls. Limit: reads no document.
"""

# Q = deltas or questions, N = positions of each, B = Q * N rows, G = rollouts per position,
# K = rollout length, R = rows of one call

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.adapters.advantage import compute_advantages
from imprint.adapters.branch_calls import Learned, Rolled
from imprint.adapters.config import RefineConfig
from imprint.adapters.loss import policy_losses
from imprint.adapters.reward import compute_rewards
from imprint.adapters.rollout import (
    BranchStart,
    Rollouts,
    branch_logprobs,
    continuations,
    roll_out,
    rollout_uniforms,
    uncertain_places,
)
from imprint.adapters.similarity import Similarity
from imprint.models import FastWeightModel, LoraDelta


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step computed before the optimizer moves; all tensors are detached."""

    positions_QN: Tensor
    recall_N: Tensor
    """Which positions recall from the document's end."""
    rollouts_QNGK: Tensor | None
    """Sampled tokens; None where nothing was rolled out."""
    rewards_QNG: Tensor | None
    advantages_QNG: Tensor | None
    policy_loss_Q: Tensor
    """Mean over all rollouts and tokens, before lambda_rl."""
    ntp_loss_Q: Tensor
    """Mean next-token loss in nats, before lambda_ntp."""
    entropy_T: Tensor | None = None
    """Entropies of this step's reading; only where a document was read for them."""
    end: BranchStart | None = None
    """Document end under the weights of this step, before the update; only where it was read."""

    @property
    def entropy_mean(self) -> float | None:
        """Mean entropy of this step's reading in nats."""
        return None if self.entropy_T is None else float(self.entropy_T.mean())


def recall_mask(num: int, config: RefineConfig, step: int) -> Tensor:
    """Which of `num` positions recall, bool [N]: evenly spread, taking turns from step to step."""
    if config.branches != "mixed":
        return torch.full((num,), config.branches == "recall")
    turn = torch.arange(num + 1, dtype=torch.float64) + step
    return ((turn * config.recall_fraction).floor().diff() > 0)[:num]


def row_batches(rows: Tensor, size: int) -> list[Tensor]:
    """The rows in pieces of at most `size`, as equal as can be; none for no rows."""
    return list(torch.tensor_split(rows, -(-len(rows) // size))) if len(rows) else []


class BranchSet:
    """The branches of one step, rows in groups of N per delta.

    Rewards, advantages and rollouts are filled in as rows are sampled, in any order.
    """

    def __init__(
        self,
        model: FastWeightModel,
        config: RefineConfig,
        tokens_T: Tensor,
        positions_QN: Tensor,
        *,
        seeds: Sequence[int],
        step: int,
        entropy_T: Tensor | None = None,
        similarity: Similarity | None = None,
    ) -> None:
        """The reading's entropies are needed where branches leave and `min_entropy` is above 0.
        Raises ValueError without."""
        self.similarity = similarity
        self.model, self.config, self.seeds, self.step = model, config, list(seeds), step
        self.positions_QN = positions_QN
        num_deltas, self.num_positions = positions_QN.shape
        rows, group, length = positions_QN.numel(), config.group_size, config.rollout_length
        self.truth_BK = continuations(tokens_T, positions_QN.flatten(), length)
        self.counts_BK: Tensor | None = None
        if config.min_entropy > 0 and rows:
            if entropy_T is None:
                raise ValueError("min_entropy needs the entropies of the reading")
            self.counts_BK = uncertain_places(
                entropy_T, positions_QN.flatten(), length, config.min_entropy
            ).to(tokens_T.device)
        self.tokens_BGK = self.truth_BK.new_zeros(rows, group, length)
        self.logprobs_BGK = torch.zeros(rows, group, length, device=tokens_T.device)
        self.rewards_BG = torch.zeros(rows, group, dtype=torch.float64, device=tokens_T.device)
        self.advantages_BG = torch.zeros_like(self.rewards_BG)
        self.sampled_B = torch.zeros(rows, dtype=torch.bool)
        self.policy_loss_Q = torch.zeros(num_deltas, dtype=torch.float64)
        self.ntp_loss_Q = torch.zeros(num_deltas, dtype=torch.float64)

    @property
    def waits_for_all(self) -> bool:
        """Whether the group is the whole document, so that all rewards come before any loss."""
        return self.config.group_size == 1

    def uniforms(self, rows_R: Tensor) -> Tensor:
        """Random numbers [R, G, K] for rows of whole deltas, or for any rows of a single one."""
        questions = sorted({row // self.num_positions for row in rows_R.tolist()})
        return rollout_uniforms(
            [self.seeds[question] for question in questions],
            self.step,
            rows_R % self.num_positions,
            self.config.group_size,
            self.config.rollout_length,
        ).to(self.truth_BK.device)

    def sample(self, rows_R: Tensor, start: BranchStart, delta: LoraDelta | None) -> None:
        """Roll out rows and take the rollouts in; rows as for `uniforms`."""
        rollouts = roll_out(
            self.model,
            start,
            self.truth_BK[rows_R],
            self.uniforms(rows_R),
            temperature=self.config.temperature,
            needs_hidden=self.config.needs_hidden,
            delta=delta,
        )
        self.take(rows_R, rollouts)

    def take(self, rows_R: Tensor, rollouts: Rollouts) -> None:
        """Judge the rollouts of rows, and keep them."""
        rewards_RG = compute_rewards(
            self.config.reward, rollouts, self.truth_BK[rows_R], self.similarity
        )
        self.tokens_BGK[rows_R] = rollouts.tokens_NGK
        self.logprobs_BGK = self.logprobs_BGK.to(rollouts.logprobs_NGK.dtype)
        self.logprobs_BGK[rows_R] = rollouts.logprobs_NGK
        self.rewards_BG[rows_R] = rewards_RG
        self.sampled_B[rows_R] = True
        if not self.waits_for_all:
            advantages = compute_advantages(self.config.advantage, rewards_RG.unsqueeze(0))
            self.advantages_BG[rows_R] = advantages[0]

    def rolled(self, rows_R: Tensor) -> Rolled:
        """What has been rolled out of rows, for their loss."""
        return Rolled(
            self.tokens_BGK[rows_R], self.logprobs_BGK[rows_R], self.advantages_BG[rows_R]
        )

    def add_losses(self, rows_R: Tensor, learned: Learned) -> None:
        """Count the losses of rows towards their deltas' means."""
        self._add(self.ntp_loss_Q, rows_R, learned.ntp_R)
        if learned.policy_R is not None:
            self._add(self.policy_loss_Q, rows_R, learned.policy_R)

    def settle(self) -> None:
        """Give the advantages of groups that span a document, once all of its rows are sampled."""
        rewards_QNG = self.rewards_BG.view(*self.positions_QN.shape, -1)
        advantages = compute_advantages(self.config.advantage, rewards_QNG)
        self.advantages_BG = advantages.reshape(self.rewards_BG.shape)

    def with_signal(self, rows_R: Tensor) -> Tensor:
        """Those of the given rows that have an advantage, or that have not been sampled yet."""
        signal_R = (self.advantages_BG[rows_R] != 0).any(-1).cpu() | ~self.sampled_B[rows_R]
        return rows_R[signal_R]

    def loss(self, rows_R: Tensor, start: BranchStart, delta: LoraDelta | None) -> Tensor:
        """lambda_rl * policy loss of the rows, their share of each delta's mean; differentiable."""
        logprobs_RGK = branch_logprobs(
            self.model,
            start,
            self.tokens_BGK[rows_R],
            temperature=self.config.temperature,
            delta=delta,
        )
        return self._policy_share(rows_R, logprobs_RGK)

    def _policy_share(self, rows_R: Tensor, logprobs_RGK: Tensor) -> Tensor:
        losses_RGK = policy_losses(
            logprobs_RGK,
            self.logprobs_BGK[rows_R],
            self.advantages_BG[rows_R].unsqueeze(-1),
            self.config,
            compute_dtype=self.model.dtype,
        )
        if self.counts_BK is not None:
            losses_RGK = losses_RGK * self.counts_BK[rows_R].unsqueeze(1)
        share_R = losses_RGK.mean((-1, -2)) / self.num_positions
        self._add(self.policy_loss_Q, rows_R, share_R)
        return self.config.lambda_rl * share_R.sum()

    def _add(self, total_Q: Tensor, rows_R: Tensor, share_R: Tensor) -> None:
        questions_R = (rows_R // self.num_positions).cpu()
        total_Q.index_add_(0, questions_R, share_R.detach().double().cpu())

    def result(self, recall_N: Tensor) -> StepResult:
        """What is known so far, as plain values."""
        shape, length = self.positions_QN.shape, self.config.rollout_length
        drawn = bool(self.sampled_B.any())
        return StepResult(
            positions_QN=self.positions_QN,
            recall_N=recall_N,
            rollouts_QNGK=self.tokens_BGK.view(*shape, -1, length) if drawn else None,
            rewards_QNG=self.rewards_BG.view(*shape, -1) if drawn else None,
            advantages_QNG=self.advantages_BG.view(*shape, -1) if drawn else None,
            policy_loss_Q=self.policy_loss_Q,
            ntp_loss_Q=self.ntp_loss_Q,
        )
