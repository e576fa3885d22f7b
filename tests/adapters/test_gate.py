"""The gate: held-out places, the probe, and the decision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.gate import (
    ProbeResult,
    judge,
    load_neutral,
    neutral_loss,
    num_probe_places,
    probe_places,
    recall_probe,
)
from imprint.adapters.selection import focus_positions, select_positions
from imprint.models import DeltaNet, LoraDelta, load_tokenizer


def entropies(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) * 5


def probe(*nats: float) -> ProbeResult:
    return ProbeResult(torch.tensor(nats, dtype=torch.float64))


@pytest.mark.parametrize("num_tokens", [0, 1, 39, 40, 79, 80, 500, 5000])
def test_at_most_an_eighth_is_held_out(num_tokens: int) -> None:
    config = RefineConfig(selection="entropy", rollout_length=5)
    places, excluded = probe_places(entropies(num_tokens), config, seed=0)
    assert len(places) == min(config.probe_places, num_tokens // 40)
    assert excluded.shape == (num_tokens,)
    assert int(excluded.sum()) <= num_tokens / 8
    for place in places.tolist():
        assert bool(excluded[place : place + config.rollout_length].all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_tokens", "length"), [(60, 3), (200, 5), (2000, 32)])
def test_no_rollout_ever_covers_a_held_out_token(seed: int, num_tokens: int, length: int) -> None:
    config = RefineConfig(selection="entropy", rollout_length=length, group_size=2)
    entropy = entropies(num_tokens, seed)
    _, excluded = probe_places(entropy, config, seed=seed)
    assert bool(excluded.any())
    relevance = torch.rand(num_tokens)
    for step in range(50):
        for positions in (
            select_positions(entropy, config, seed=seed, step=step, excluded_T=excluded),
            focus_positions(entropy, relevance, config, seed=seed, step=step, excluded_T=excluded),
        ):
            for position in positions.tolist():
                assert not bool(excluded[position : position + length].any())


def test_chosen_by_writing_the_strongest_places_judge_and_every_second_is_held_out() -> None:
    config = RefineConfig(selection="write", rollout_length=5, probe_places=3)
    strength = torch.zeros(300)
    strength[50:55] = strength[120:125] = strength[200:205] = 1.0
    places, excluded = probe_places(torch.ones(300), config, seed=0, write_T=strength)
    assert places.tolist() == [50, 120, 200]
    assert excluded.nonzero().flatten().tolist() == [*range(50, 55), *range(200, 205)]


def test_chosen_by_writing_short_documents_can_be_judged() -> None:
    config = RefineConfig(selection="write", rollout_length=10)
    assert [num_probe_places(n, config) for n in (19, 40, 128, 640, 4096)] == [0, 2, 6, 8, 32]
    by_entropy = config.replace(selection="entropy")
    assert [num_probe_places(n, by_entropy) for n in (40, 128, 640, 4096)] == [0, 1, 8, 32]


def test_places_do_not_depend_on_the_rollouts() -> None:
    # a large group bounds the positions of a step, but the probe rolls nothing out
    entropy = entropies(20_000)
    few = probe_places(
        entropy,
        RefineConfig(selection="entropy", rollout_length=5, probe_places=256, group_size=2),
        seed=3,
    )
    many = probe_places(
        entropy,
        RefineConfig(selection="entropy", rollout_length=5, probe_places=256, group_size=256),
        seed=3,
    )
    assert len(few[0]) == 256
    assert torch.equal(few[0], many[0])


def test_long_places_are_bounded() -> None:
    config = RefineConfig(
        selection="entropy", probe_places=256, rollout_length=256, group_size=1, cue_tokens=256
    )
    places, _ = probe_places(entropies(600_000), config, seed=0)
    assert 2 <= len(places) < 256


@pytest.mark.parametrize("with_delta", [False, True])
def test_probe_equals_reading_cue_and_continuation(
    tiny_model: DeltaNet, read_adapter: Adapter, with_delta: bool
) -> None:
    config = RefineConfig(cue_tokens=4, rollout_length=3)
    places = torch.tensor([2, 50, 120])  # the first has a shorter cue
    delta = None
    if with_delta:
        delta = LoraDelta.init(tiny_model.lora_targets(), 2, seed=0)
        for tensor in delta.b.values():
            tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    tokens = read_adapter.tokens_T
    got = recall_probe(tiny_model, tokens, places, read_adapter.state, config, delta=delta)
    for i, place in enumerate(places.tolist()):
        piece = tokens[max(place - 4, 0) : place + 3]
        with torch.no_grad():
            hidden, _ = tiny_model(piece.unsqueeze(0), read_adapter.state, delta=delta)
        logprobs = tiny_model.logits(hidden[0]).log_softmax(-1)
        asked = logprobs[-4:-1].gather(1, piece[-3:].unsqueeze(1))
        assert float(got.nll_P[i]) == pytest.approx(-float(asked.mean()), abs=1e-5)
    assert got.mean == pytest.approx(float(got.nll_P.mean()))


def test_probe_of_many_deltas_groups_the_places(
    tiny_model: DeltaNet, read_adapter: Adapter
) -> None:
    config = RefineConfig(cue_tokens=4, rollout_length=3)
    delta = LoraDelta.init(tiny_model.lora_targets(), 2, seed=0, num=2)
    for i, tensor in enumerate(delta.b.values()):
        tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    places = torch.tensor([30, 60, 90, 120])
    tokens, state = read_adapter.tokens_T, read_adapter.state
    both = recall_probe(tiny_model, tokens, places, state, config, delta=delta)
    for i in range(2):
        own, half = delta.slice(i, i + 1), slice(2 * i, 2 * i + 2)
        single = recall_probe(tiny_model, tokens, places[half], state, config, delta=own)
        torch.testing.assert_close(both.nll_P[half], single.nll_P, rtol=0, atol=1e-5)


def test_neutral_loss_is_the_mean_cross_entropy(tiny_model: DeltaNet) -> None:
    neutral = [5, 9, 200, 31, 7]
    with torch.no_grad():
        hidden, _ = tiny_model(torch.tensor([neutral]))
    logprobs = tiny_model.logits(hidden[0]).log_softmax(-1)
    right = -sum(float(logprobs[i, token]) for i, token in enumerate(neutral[1:])) / 4
    assert neutral_loss(tiny_model, neutral, None) == pytest.approx(right, abs=1e-5)


def test_neutral_text_comes_with_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    neutral = load_neutral(tiny_checkpoint, tokenizer)
    assert neutral is not None
    assert tokenizer.decode(neutral).startswith("It rained.")
    assert len(neutral) <= 256
    assert load_neutral(tmp_path, tokenizer) is None


def test_clear_improvement_is_accepted() -> None:
    verdict = judge(probe(3, 4, 5), probe(2, 3.1, 3.9), RefineConfig(), neutral_rise_nats=0.01)
    assert verdict.accepted
    assert verdict.gain_nats == pytest.approx(1.0)
    assert verdict.gain_error_nats == pytest.approx(0.1 / math.sqrt(3))


@pytest.mark.parametrize(
    ("after", "rise", "settings", "reason"),
    [
        ((3, 4, 5), None, {}, "did not improve"),
        ((3.5, 4.5, 5.5), None, {}, "did not improve"),
        ((1, 4.5, 5.5), None, {}, "beyond its noise"),
        ((2.9, 3.9, 4.9), None, {"probe_margin": 0.2}, "did not improve"),
        ((2, 3.1, 3.9), 0.5, {}, "neutral text rose"),
        ((2, 3.1, 3.9), math.nan, {}, "neutral text rose"),
        ((2, 3.1, 3.9), math.inf, {}, "neutral text rose"),
        ((2, 3.1, math.nan), None, {}, "not finite"),
        ((2, 3.1, math.inf), None, {}, "not finite"),
    ],
)
def test_anything_else_is_refused(
    after: tuple[float, ...], rise: float | None, settings: dict[str, float], reason: str
) -> None:
    config = RefineConfig(**settings)
    verdict = judge(probe(3, 4, 5), probe(*after), config, neutral_rise_nats=rise)
    assert not verdict.accepted
    assert reason in verdict.reason
    assert verdict.neutral_rise_nats is rise


def test_confidence_zero_takes_any_improvement() -> None:
    config = RefineConfig(probe_confidence=0)
    assert judge(probe(3, 4), probe(1, 5.5), config, neutral_rise_nats=None).accepted
    assert judge(probe(3), probe(2.9), config, neutral_rise_nats=None).accepted


def test_one_place_is_not_evidence() -> None:
    verdict = judge(probe(9), probe(1), RefineConfig(), neutral_rise_nats=None)
    assert not verdict.accepted
    assert "single place" in verdict.reason
