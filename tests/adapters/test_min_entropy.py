"""What the reading was sure of does not count: the form of a text, as opposed to its content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.branches import query_step
from imprint.adapters.calls import run_calls
from imprint.adapters.config import PRESETS, RefineConfig
from imprint.adapters.delta import init_delta
from imprint.adapters.errors import ConfigError
from imprint.adapters.policy import StepResult
from imprint.adapters.reading import read_segments
from imprint.adapters.rollout import continuations, uncertain_places
from imprint.adapters.trunk import trunk_step
from imprint.models import DeltaNet, DeltaNetConfig, LoraDelta, prefill

SETTINGS: dict[str, Any] = {
    "preset": "focus", "lambda_rl": 0.4, "positions": 4, "rollout_length": 5, "cue_tokens": 3,
    "lora_rank": 2, "group_size": 2,
}  # fmt: skip
TOKENS_T = torch.randint(1, 40, (70,), generator=torch.Generator().manual_seed(5))
POSITIONS_QN = torch.tensor([[6, 16, 33, 60]])


@pytest.fixture(scope="module")
def model() -> DeltaNet:
    model = DeltaNet(
        DeltaNetConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_heads=2, intermediate_size=48,
            initializer_range=0.3,
        )
    )  # fmt: skip
    model.reset_parameters(2)
    return model.double().requires_grad_(False)


def run(
    model: DeltaNet, config: RefineConfig, entropy_T: Tensor | None
) -> tuple[StepResult, LoraDelta]:
    delta = init_delta(model, config, seed=3, num=1)
    for parameter in delta.parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    delta = delta.detach().requires_grad_()
    _, end_state = prefill(model, TOKENS_T.unsqueeze(0))
    step = query_step(
        model,
        TOKENS_T,
        POSITIONS_QN,
        config,
        delta=delta,
        end_state=end_state,
        seeds=[1],
        step=0,
        entropy_T=entropy_T,
    )
    result: StepResult = run_calls(step)
    return result, delta


def gradients(delta: LoraDelta) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in delta.parameters()]


def test_a_token_is_judged_by_what_was_expected_before_it() -> None:
    entropy_T = torch.tensor([0.0, 3.0, 0.5, 2.0, 1.0, 9.0])
    places = uncertain_places(entropy_T, torch.tensor([2, 1]), 3, 1.0)
    assert places.tolist() == [[True, False, True], [False, True, False]]


def test_only_uncertain_tokens_are_learnt(model: DeltaNet) -> None:
    """The gradient is that of the counted tokens' log-probabilities, summed by hand."""
    config = RefineConfig.from_dict({**SETTINGS, "lambda_rl": 0.0})
    entropy_T = torch.where(torch.arange(70) % 3 == 0, 0.2, 2.0)
    result, delta = run(model, config, entropy_T)
    by_hand = delta.detach().clone().requires_grad_()
    _, end_state = prefill(model, TOKENS_T.unsqueeze(0))
    positions_N = POSITIONS_QN[0]
    counted = torch.tensor(0.0, dtype=torch.float64)
    for position in positions_N.tolist():
        sequence = TOKENS_T[position - 3 : position + 5]
        hidden, _ = model(sequence.unsqueeze(0), end_state, delta=by_hand)
        logprobs = model.token_logprobs(hidden[0, 2:-1], sequence[3:])
        for offset in range(5):
            if (position + offset - 1) % 3 != 0:
                counted = counted - logprobs[offset] / 5 / len(positions_N)
    counted.backward()
    assert float(result.ntp_loss_Q[0]) == pytest.approx(float(counted.detach()), rel=1e-9)
    for mine, theirs in zip(gradients(delta), gradients(by_hand), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lambda_rl", [0.0, 0.4])
def test_all_count_or_none(model: DeltaNet, lambda_rl: float) -> None:
    config = RefineConfig.from_dict({**SETTINGS, "lambda_rl": lambda_rl})
    _, all_of_them = run(model, config, torch.full((70,), 1.0))
    _, without = run(model, config.replace(min_entropy=0.0), None)
    for mine, theirs in zip(gradients(all_of_them), gradients(without), strict=True):
        assert torch.equal(mine, theirs)
        assert bool(mine.any())
    _, none = run(model, config, torch.full((70,), 0.99))
    assert not any(bool(gradient.any()) for gradient in gradients(none))


def test_continuations_and_their_places_are_the_same_tokens() -> None:
    entropy_T = TOKENS_T.roll(-1).double()  # after each token: the next one's number
    truth_NK = continuations(TOKENS_T, POSITIONS_QN[0], 5)
    counts_NK = uncertain_places(entropy_T, POSITIONS_QN[0], 5, 20.0)
    assert torch.equal(counts_NK, truth_NK >= 20)


def test_what_it_needs_is_said(model: DeltaNet) -> None:
    with pytest.raises(ConfigError, match="min_entropy"):
        RefineConfig.from_dict({"min_entropy": -1.0})
    with pytest.raises(ValueError, match="entropies of the reading"):
        run(model, RefineConfig.from_dict(SETTINGS), None)


@pytest.mark.parametrize("min_entropy", [0.0, 3.0, 20.0])
def test_rollouts_of_a_document_read_again_count_where_it_was_uncertain(
    model: DeltaNet, min_entropy: float
) -> None:
    """The policy loss by hand: before the first update each token's loss is minus its advantage."""
    config = RefineConfig.from_dict(
        {**SETTINGS, "preset": "default", "scope": "lora", "lora_targets": [],
         "min_entropy": min_entropy, "branches": "mixed", "lambda_ntp": 0.0, "advantage": "rloo"}
    )  # fmt: skip
    delta = init_delta(model, config, seed=3).requires_grad_()
    step = trunk_step(
        model, TOKENS_T, config, delta=delta, seed=1, step=0, positions_N=POSITIONS_QN[0]
    )
    result: StepResult = run_calls(step)
    reading = run_calls(read_segments(model, TOKENS_T, segment_tokens=16))
    counts_NK = uncertain_places(reading.entropy_T, POSITIONS_QN[0], 5, min_entropy)
    assert bool(counts_NK.any()) == (min_entropy < 20)
    assert bool(counts_NK.all()) == (min_entropy == 0)
    assert result.advantages_QNG is not None
    share_N = counts_NK.double().mean(-1)
    by_hand = -(result.advantages_QNG[0].mean(-1) * share_N).mean()
    assert float(result.policy_loss_Q[0]) == pytest.approx(float(by_hand), abs=1e-9)
    moved = any(bool(gradient.any()) for gradient in gradients(delta))
    assert moved == (min_entropy < 20)


def test_only_the_published_method_counts_every_token() -> None:
    assert {name for name in PRESETS if RefineConfig.preset(name).min_entropy == 0} == {"paper"}
