"""Rollouts: on-policy log-probabilities, random streams, cues, and going back to a place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.calls import Calls, Work, run_calls
from imprint.adapters.config import RefineConfig
from imprint.adapters.policy import recall_mask
from imprint.adapters.reading import read_segments, states_at
from imprint.adapters.rollout import (
    BranchStart,
    Cues,
    Rollouts,
    branch_logprobs,
    continuations,
    cued_hidden,
    read_cues,
    rollout_uniforms,
    sample_rollouts,
    sequence_hidden,
)
from imprint.models import DeltaNet, DeltaNetConfig, LoraDelta


def tiny_model(dtype: torch.dtype = torch.float64) -> DeltaNet:
    config = DeltaNetConfig(
        vocab_size=23, hidden_size=32, num_hidden_layers=2, num_heads=2, intermediate_size=48
    )
    model = DeltaNet(config)
    model.reset_parameters(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.to(dtype).requires_grad_(False)


def document(length: int = 60) -> Tensor:
    return torch.randint(0, 23, (length,), generator=torch.Generator().manual_seed(0))


def drain(calls: Calls[Any]) -> tuple[Any, list[Work]]:
    done: list[Work] = []
    return run_calls(calls, done.append), done


def start_after(model: DeltaNet, tokens_T: Tensor, positions: list[int]) -> BranchStart:
    starts = []
    for position in positions:
        hidden, state = model(tokens_T[:position].unsqueeze(0))
        starts.append(BranchStart(hidden[:, -1], state))
    return BranchStart.stack(starts)


def roll(
    model: DeltaNet, positions: list[int], config: RefineConfig, delta: LoraDelta | None = None
) -> tuple[Rollouts, BranchStart, Tensor]:
    tokens_T = document()
    start = start_after(model, tokens_T, positions)
    truth_NK = continuations(tokens_T, torch.tensor(positions), config.rollout_length)
    rollouts = sample_rollouts(
        model,
        start,
        truth_NK,
        config,
        seeds=[9],
        step=2,
        branches_N=torch.arange(len(positions)),
        delta=delta,
    )
    return rollouts, start, truth_NK


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("length", [1, 5])
def test_sampled_logprobs_are_the_teacher_forced_ones(
    dtype: torch.dtype, tolerance: float, temperature: float, length: int
) -> None:
    model = tiny_model(dtype)
    config = RefineConfig(group_size=3, rollout_length=length, temperature=temperature)
    rollouts, start, _ = roll(model, [7, 20, 31], config)
    assert rollouts.tokens_NGK.shape == (3, 3, length)
    logprobs = branch_logprobs(model, start, rollouts.tokens_NGK, temperature=temperature)
    torch.testing.assert_close(logprobs, rollouts.logprobs_NGK, rtol=0, atol=tolerance)
    ratio = (logprobs - rollouts.logprobs_NGK).exp()
    assert float((ratio - 1).abs().max()) < tolerance


@pytest.mark.parametrize("per_branch", [1, 3])
@pytest.mark.parametrize("positions", [(20, 30, 41), (2, 20, 41)], ids=["alike", "a short cue"])
@pytest.mark.parametrize("length", [1, 5])
def test_sequences_behind_a_cue_are_those_behind_its_state(
    positions: tuple[int, ...], per_branch: int, length: int
) -> None:
    model, tokens_T = tiny_model(), document()
    cues = Cues.before(tokens_T, torch.tensor(positions), 6)
    sequences = torch.arange(len(positions) * per_branch * length) % model.config.vocab_size
    sequences_NRK = sequences.view(len(positions), per_branch, length)
    with torch.no_grad():
        _, state = model(tokens_T.unsqueeze(0))
    right = sequence_hidden(model, cues.read(model, state, None), sequences_NRK)
    found = cued_hidden(model, cues, state, sequences_NRK)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_probabilities_and_hidden_states_of_the_truth() -> None:
    model = tiny_model()
    config = RefineConfig(group_size=2, rollout_length=4, reward="cosine")
    rollouts, start, truth_NK = roll(model, [7, 20], config)
    assert rollouts.hidden_NGKD is not None
    assert rollouts.truth_hidden_NKD is not None
    hidden, _ = model(document().unsqueeze(0))
    torch.testing.assert_close(rollouts.truth_hidden_NKD[1], hidden[0, 20:24])
    read, _ = model(rollouts.tokens_NGK[1, 1:], start.state.slice(1, 2))
    torch.testing.assert_close(rollouts.hidden_NGKD[1, 1], read[0])
    first = model.logits(start.hidden_ND).log_softmax(-1).gather(1, truth_NK[:, :1])
    torch.testing.assert_close(rollouts.truth_logprobs_NGK[:, :, 0], first.expand(2, 2))
    plain, _, _ = roll(model, [7, 20], config.replace(reward="exact"))
    assert plain.hidden_NGKD is None
    assert torch.equal(plain.tokens_NGK, rollouts.tokens_NGK)


def test_a_rollout_does_not_depend_on_its_company() -> None:
    model = tiny_model()
    config = RefineConfig(group_size=4, rollout_length=5)
    together, _, _ = roll(model, [7, 20, 31], config)
    alone, _, _ = roll(model, [7], config)
    fewer, _, _ = roll(model, [7], config.replace(group_size=2))
    assert torch.equal(together.tokens_NGK[:1], alone.tokens_NGK)
    assert torch.equal(alone.tokens_NGK[:, :2], fewer.tokens_NGK)
    assert len({tuple(row) for row in together.tokens_NGK.flatten(0, 1).tolist()}) > 6


def test_samples_follow_the_distribution() -> None:
    model = tiny_model()
    config = RefineConfig(group_size=256, rollout_length=1, cue_tokens=1)
    rollouts, start, _ = roll(model, [12] * 20, config)
    probs = model.logits(start.hidden_ND[:1]).softmax(-1)[0]
    counts = torch.bincount(rollouts.tokens_NGK.flatten(), minlength=23)
    assert float((counts / counts.sum() - probs).abs().max()) < 0.02


def test_uniforms_are_a_function_of_seed_step_branch_rollout_and_token() -> None:
    base = rollout_uniforms([1, 2], 3, torch.tensor([0, 1, 0, 1]), 4, 5)
    assert base.shape == (4, 4, 5)
    assert len(base.unique()) == base.numel()
    alone = rollout_uniforms([2], 3, torch.tensor([1]), 4, 5)
    assert torch.equal(base[3:], alone)
    assert not torch.equal(alone, rollout_uniforms([2], 4, torch.tensor([1]), 4, 5))


@pytest.mark.parametrize("positions", [[8, 20, 33], [1, 3, 20]], ids=["even", "ragged"])
def test_cues(positions: list[int]) -> None:
    model, tokens_T = tiny_model(), document()
    _, end = model(tokens_T.unsqueeze(0))
    cued = read_cues(model, tokens_T, torch.tensor(positions), end.fork(3), 6)
    for row, position in enumerate(positions):
        hidden, state = model(tokens_T[max(0, position - 6) : position].unsqueeze(0), end)
        torch.testing.assert_close(cued.hidden_ND[row], hidden[0, -1])
        torch.testing.assert_close(cued.state.slice(row, row + 1).tensors(), state.tensors())


@pytest.mark.parametrize("segment_tokens", [16, 60, 64])
def test_going_back_to_a_place(segment_tokens: int) -> None:
    model, tokens_T = tiny_model(), document()
    reading, work = drain(read_segments(model, tokens_T, segment_tokens=segment_tokens))
    assert sum(done.forward_tokens for done in work) == 60
    assert reading.entropy_T.shape == (60,)
    positions = torch.tensor([33, 1, 16, 60, 17, 15])
    start, _ = drain(states_at(model, reading, positions))
    for row, position in enumerate(positions.tolist()):
        hidden, state = model(tokens_T[:position].unsqueeze(0))
        torch.testing.assert_close(start.hidden_ND[row], hidden[0, -1])
        torch.testing.assert_close(start.state.slice(row, row + 1).tensors(), state.tensors())
    torch.testing.assert_close(start.hidden_ND[3:4], reading.end.hidden_ND)
    origin, _ = drain(states_at(model, reading, torch.tensor([0])))
    assert not any(bool(tensor.any()) for tensor in origin.state.tensors())


def test_kept_states_do_not_keep_their_segments() -> None:
    model, tokens_T = tiny_model(), document()
    reading, _ = drain(read_segments(model, tokens_T, segment_tokens=16))
    assert reading.states.batch_size == reading.num_segments == 4
    for state in (reading.states, reading.end.state):
        for tensor in state.tensors():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_an_empty_document_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        drain(read_segments(tiny_model(), document(0), segment_tokens=16))


def test_mixed_branches_take_turns() -> None:
    config = RefineConfig(branches="mixed", recall_fraction=0.25)
    masks = torch.stack([recall_mask(8, config, step) for step in range(4)])
    assert masks.sum(1).tolist() == [2, 2, 2, 2]
    assert bool(masks.any(0).all())
    assert recall_mask(3, config.replace(branches="recall"), 0).all()
    assert not recall_mask(3, config.replace(branches="continue"), 0).any()
