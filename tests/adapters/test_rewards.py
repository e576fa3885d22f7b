"""Rewards, advantages and losses, on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch

from imprint.adapters.advantage import compute_advantages, count_tied_groups
from imprint.adapters.config import RefineConfig
from imprint.adapters.loss import clip_grads_per_delta, policy_losses
from imprint.adapters.reward import compute_rewards
from imprint.adapters.rollout import Rollouts
from imprint.models import LoraDelta


def some_rollouts(hidden: bool = True) -> tuple[Rollouts, torch.Tensor]:
    truth_NK = torch.tensor([[1, 2], [3, 4]])
    tokens_NGK = torch.tensor([[[1, 2], [1, 9], [9, 9]], [[3, 9], [9, 3], [4, 3]]])
    hidden_NGKD = torch.zeros(2, 3, 2, 2)
    hidden_NGKD[..., 0] = 1.0
    hidden_NGKD[0, 1] = torch.tensor([[0.0, 1.0], [-2.0, 0.0]])
    truth_hidden_NKD = torch.tensor([[[3.0, 0.0]] * 2] * 2)
    logprobs = torch.full((2, 3, 2), math.log(0.5))
    truth_logprobs = torch.tensor([[[0.5, 0.1], [0.2, 0.2], [1.0, 0.0]]] * 2).log()
    return (
        Rollouts(
            tokens_NGK,
            logprobs,
            truth_logprobs,
            hidden_NGKD if hidden else None,
            truth_hidden_NKD if hidden else None,
        ),
        truth_NK,
    )


def test_rewards() -> None:
    rollouts, truth_NK = some_rollouts()
    exact = compute_rewards("exact", rollouts, truth_NK)
    assert exact.tolist() == [[1.0, 0.5, 0.0], [0.5, 0.0, 0.0]]
    cosine = compute_rewards("cosine", rollouts, truth_NK)
    assert cosine.tolist() == [[1.0, -0.5, 1.0], [1.0, 1.0, 1.0]]
    assert torch.equal(compute_rewards("hybrid", rollouts, truth_NK), cosine + exact)
    expected = compute_rewards("expected_exact", rollouts, truth_NK)
    torch.testing.assert_close(expected[0], torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64))


def tokens_only(tokens_GK: list[list[int]]) -> Rollouts:
    tokens_NGK = torch.tensor([tokens_GK])
    unused = torch.zeros(tokens_NGK.shape)
    return Rollouts(tokens_NGK, unused, unused, None, None)


def test_edit_counts_a_shifted_token_once() -> None:
    truth_NK = torch.tensor([[1, 2, 3, 4]])
    asked = [[1, 2, 3, 4], [9, 1, 2, 3], [1, 3, 4, 9], [2, 1, 4, 3], [9, 9, 9, 9]]
    rewards = compute_rewards("edit", tokens_only(asked), truth_NK)
    assert rewards.tolist() == [[1.0, 0.5, 0.5, 0.25, 0.0]]


def test_ngram_is_smoothed_bleu() -> None:
    truth_NK = torch.tensor([[1, 2, 3, 2, 5]])
    asked = [[1, 2, 3, 2, 5], [2, 3, 1, 2, 2], [2, 2, 2, 2, 2], [9, 9, 9, 9, 9]]
    rewards = compute_rewards("ngram", tokens_only(asked), truth_NK)[0]
    # unigrams 4 of 5 (2 counts twice), bigrams 2 of 4 (23, 12), no trigram of 3, no 4-gram of 2
    second = (4 / 5 * 3 / 5 * 1 / 4 * 1 / 3) ** (1 / 4)
    third = (2 / 5 * 1 / 5 * 1 / 4 * 1 / 3) ** (1 / 4)
    expected = torch.tensor([1.0, second, third, 0.0], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected)


def test_ngram_of_short_rollouts_has_fewer_orders() -> None:
    rewards = compute_rewards("ngram", tokens_only([[1, 2], [2, 1]]), torch.tensor([[1, 2]]))
    torch.testing.assert_close(rewards, torch.tensor([[1.0, 0.5**0.5]], dtype=torch.float64))


def test_cosine_needs_hidden_states() -> None:
    rollouts, truth_NK = some_rollouts(hidden=False)
    with pytest.raises(ValueError, match="hidden"):
        compute_rewards("cosine", rollouts, truth_NK)


def test_advantages_of_a_position() -> None:
    rewards = torch.tensor([[[1.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]]])
    centred = torch.tensor([0.5, -0.5, 0.0, 0.0], dtype=torch.float64)
    std = math.sqrt(0.5 / 3)
    expected = {"dr_grpo": centred, "rloo": centred * 4 / 3, "grpo": centred / (std + 1e-6)}
    for name, wanted in expected.items():
        advantages = compute_advantages(name, rewards)
        torch.testing.assert_close(advantages[0, 0], wanted)
        assert not advantages[0, 1].any()
    assert count_tied_groups(rewards) == 1


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo"])
def test_single_rollouts_form_a_group_over_the_document(name: str) -> None:
    over_document = torch.tensor([[0.1, 0.9, 0.4], [0.2, 0.2, 0.2]])
    advantages = compute_advantages(name, over_document.unsqueeze(-1))
    as_positions = compute_advantages(name, over_document.unsqueeze(0))[0]
    torch.testing.assert_close(advantages.squeeze(-1), as_positions)
    assert not advantages[1].any()


@pytest.mark.parametrize("name", ["grpo", "rloo", "dr_grpo"])
def test_a_group_of_one_and_of_none(name: str) -> None:
    assert not compute_advantages(name, torch.ones(1, 1, 1)).any()
    assert compute_advantages(name, torch.ones(1, 0, 4)).shape == (1, 0, 4)
    assert compute_advantages(name, torch.ones(2, 0, 1)).shape == (2, 0, 1)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = torch.rand(1, 2, 5, dtype=torch.float64)
    advantages = compute_advantages("rloo", rewards)
    others = (rewards.sum(-1, keepdim=True) - rewards) / 4
    torch.testing.assert_close(advantages, rewards - others)


def losses_of(
    logprobs: torch.Tensor, sampled: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    return policy_losses(
        logprobs, sampled, advantages, RefineConfig(), compute_dtype=logprobs.dtype
    )


def test_policy_loss_is_reinforce_where_the_ratio_is_one() -> None:
    logprobs = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(3, 1, dtype=torch.float64)
    losses = losses_of(logprobs, logprobs.detach(), advantages)
    torch.testing.assert_close(losses.detach(), -advantages.expand(3, 4))
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages.expand(3, 4))


def test_stale_rollouts_are_our_own_mistake() -> None:
    logprobs = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="on-policy"):
        losses_of(logprobs + 0.1, logprobs, torch.ones(2, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_pass_through_to_the_caller(value: float) -> None:
    logprobs = torch.tensor([value, 0.0])
    losses = losses_of(logprobs, torch.zeros(2), torch.ones(2))
    assert losses[1] == -1


def test_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imprint.adapters.loss._RATIO_TOLERANCE", {torch.float32: 100.0})
    new = torch.tensor([1.5, 0.5, 1.5, 0.5, 9.0]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    losses = losses_of(new, torch.zeros(5), advantages)
    torch.testing.assert_close(losses, torch.tensor([-1.2, -0.5, 1.5, 0.8, 3.0]))


def test_each_delta_is_clipped_by_its_own_norm() -> None:
    delta = LoraDelta.init({"x": (4, 3)}, 2, seed=0, num=3).requires_grad_()
    assert clip_grads_per_delta(delta, 1.0).tolist() == [0.0, 0.0, 0.0]
    for tensor in delta.parameters():
        tensor.grad = torch.ones_like(tensor)
        tensor.grad[1] *= 1e-3
        tensor.grad[2] = float("nan")
    norms = clip_grads_per_delta(delta, 1.0)
    assert norms[0] == pytest.approx(math.sqrt(14))
    assert norms[1] == pytest.approx(1e-3 * math.sqrt(14))
    assert math.isnan(norms[2])
    grads = [tensor.grad for tensor in delta.parameters() if tensor.grad is not None]
    assert sum(float(grad[0].square().sum()) for grad in grads) == pytest.approx(1.0)
    assert float(grads[0][1].max()) == pytest.approx(1e-3)
