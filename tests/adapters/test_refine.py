"""Whole studies on a tiny random model: every document ends in a clear outcome, and repeatably."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.config_fields import BRANCHES, REWARDS
from imprint.adapters.document import DocumentReader, tokens_sha256
from imprint.adapters.errors import AdaptationError
from imprint.adapters.gate import neutral_loss, probe_places, recall_probe
from imprint.adapters.quantum import Quantum
from imprint.adapters.refine import Refiner
from imprint.models import DeltaNet, generate_greedy, token_entropy, weights_hash

NEUTRAL = list(range(60, 90))
SCOPES = ("lora", "query_lora", "state")  # for full, see test_scopes.py


def refined(
    model: DeltaNet, tokens: list[int], config: RefineConfig, **kwargs: Any
) -> tuple[Adapter, list[Quantum]]:
    refiner = Refiner(model, tokens, config, **kwargs)
    quanta = list(refiner.run())
    assert refiner.adapter is not None
    return refiner.adapter, quanta


def tensors_equal(first: Adapter, second: Adapter) -> bool:
    mine, theirs = first.to_tensors(), second.to_tensors()
    return mine.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in mine.items()
    )


def assert_clear_outcome(adapter: Adapter) -> None:
    manifest = adapter.manifest
    result = manifest["result"]
    assert manifest["outcome"] == ("succeeded" if adapter.adapted else "rejected")
    assert result["accepted"] == adapter.adapted
    assert result["reason"]
    assert json.loads(json.dumps(manifest, allow_nan=False)) == manifest
    if adapter.adapted:
        assert result["alpha"] in manifest["config"]["blend_factors"]
        assert result["probe_after"] < result["probe_before"]
        assert 1 <= result["best_step"] <= manifest["config"]["steps"]
    assert all(bool(t.isfinite().all()) for t in adapter.to_tensors().values())


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 20, 40, 41, 48, 200])
def test_documents_of_any_length_end_clearly(
    tiny_model: DeltaNet,
    document: list[int],
    small: RefineConfig,
    num_tokens: int,
    scope: str,
    branches: str,
) -> None:
    config = small.replace(scope=scope, branches=branches)
    adapter, quanta = refined(tiny_model, document[:num_tokens], config, neutral=NEUTRAL)
    assert_clear_outcome(adapter)
    assert len(adapter.tokens_T) == len(adapter.entropy_T) == num_tokens
    assert sum(quantum.num_tokens for quantum in quanta) <= sum(adapter.manifest["usage"].values())
    if num_tokens <= 20:
        assert "too short" in adapter.manifest["result"]["reason"]


@pytest.mark.parametrize("preset", ["default", "fast", "paper"])
@pytest.mark.parametrize("num_tokens", [1, 6, 39, 40, 45, 85])
def test_presets_on_short_documents(
    tiny_model: DeltaNet, document: list[int], preset: str, num_tokens: int
) -> None:
    config = RefineConfig.preset(preset, steps=1)
    adapter, _ = refined(tiny_model, document[:num_tokens], config)
    assert_clear_outcome(adapter)


@pytest.mark.parametrize("reward", [name for name in REWARDS if name != "semantic"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_rewards_and_group_sizes(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, reward: str, group_size: int
) -> None:
    for scope in SCOPES:
        config = small.replace(reward=reward, group_size=group_size, scope=scope, steps=2)
        assert_clear_outcome(refined(tiny_model, document, config)[0])


def test_empty_document_is_refused_with_a_code(tiny_model: DeltaNet, small: RefineConfig) -> None:
    for begin in (
        lambda: Refiner(tiny_model, [], small),
        lambda: DocumentReader(tiny_model, [], segment_tokens=64),
    ):
        with pytest.raises(AdaptationError, match="holds no tokens") as error:
            begin()
        assert error.value.code == "document_empty"


@pytest.mark.parametrize("bad", [-1, 257, 10**6])
def test_foreign_token_ids_are_named(tiny_model: DeltaNet, small: RefineConfig, bad: int) -> None:
    with pytest.raises(AdaptationError, match=rf"token id {bad} is outside") as error:
        Refiner(tiny_model, [1, bad, 5], small)
    assert error.value.code == "invalid_token"


def test_targets_that_match_nothing_are_refused(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    with pytest.raises(AdaptationError, match="no projection's name ends in") as error:
        refined(tiny_model, document, small.replace(lora_targets=["z_proj"]))
    assert error.value.code == "invalid_method"


def test_only_the_named_projections_are_changed(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    config = small.replace(lora_targets=["q_proj", "attn.o_proj"])
    adapter, _ = refined(tiny_model, document, config)
    assert adapter.delta is not None
    assert {name.split(".")[-1] for name in adapter.delta.a} == {"q_proj", "o_proj"}


@pytest.mark.parametrize("scope", SCOPES)
def test_studying_helps_recall_and_keeps_the_base(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    before = weights_hash(tiny_model)
    rate = 0.3 if scope == "state" else small.learning_rate
    config = small.replace(scope=scope, learning_rate=rate)
    adapter, _ = refined(tiny_model, document, config)
    assert adapter.adapted
    assert weights_hash(tiny_model) == before
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.parameters())
    with torch.no_grad():
        hidden, base_end = tiny_model(torch.tensor([document]))
        delta = adapter.delta if scope == "lora" else None
        _, end = tiny_model(torch.tensor([document]), adapter.start, delta=delta)
    for got, right in zip(adapter.state.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    entropy = token_entropy(tiny_model.logits(hidden[0]))
    torch.testing.assert_close(adapter.entropy_T, entropy, rtol=1e-4, atol=1e-4)
    same = all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(adapter.state.tensors(), base_end.tensors(), strict=True)
    )
    assert same == (scope == "query_lora")
    assert (adapter.delta is None, adapter.start is None) == (scope == "state", scope != "state")


def test_rejected_documents_keep_the_base_state(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    for scope in SCOPES:
        config = small.replace(scope=scope, probe_margin=50.0)
        adapter, _ = refined(tiny_model, document, config)
        assert not adapter.adapted
        assert_clear_outcome(adapter)
        reader = DocumentReader(tiny_model, document, segment_tokens=64)
        list(reader.run())
        assert reader.adapter is not None
        assert tensors_equal(adapter, reader.adapter)


def test_rise_on_neutral_text_is_refused_or_blended_away(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    # what the model itself would say: any large change makes it less likely
    own_text = generate_greedy(tiny_model, torch.tensor([[5]]), None, num_tokens=60)[0].tolist()
    config = small.replace(scope="lora", learning_rate=0.05, steps=8, patience=8)
    free, _ = refined(tiny_model, document, config)
    assert free.adapted
    assert free.manifest["result"]["neutral_rise_nats"] is None
    gated, _ = refined(tiny_model, document, config.replace(blend_factors=[1.0]), neutral=own_text)
    assert not gated.adapted
    assert "neutral text" in gated.manifest["result"]["reason"]
    assert gated.manifest["result"]["neutral_rise_nats"] > config.neutral_margin
    factors = [1.0, 0.5, 0.05]
    blended, _ = refined(
        tiny_model,
        document,
        config.replace(blend_factors=factors, probe_confidence=0),
        neutral=own_text,
    )
    assert blended.adapted
    result = blended.manifest["result"]
    assert result["alpha"] < 1
    assert result["neutral_rise_nats"] <= config.neutral_margin
    assert_clear_outcome(blended)
    assert blended.delta is not None
    with torch.no_grad():
        _, end = tiny_model(torch.tensor([document]), delta=blended.delta)
    for got, right in zip(blended.state.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_a_loss_on_neutral_text_that_is_known_is_not_read_again(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    read, _ = refined(tiny_model, document, small, neutral=NEUTRAL)
    base = neutral_loss(tiny_model, NEUTRAL, None)
    known, _ = refined(tiny_model, document, small, neutral=NEUTRAL, neutral_base=base)
    assert tensors_equal(known, read)
    assert known.manifest["result"] == read.manifest["result"]
    saved = read.manifest["usage"]["tokens_forward"] - known.manifest["usage"]["tokens_forward"]
    assert saved == len(NEUTRAL)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("lambda_rl", [0.0, 0.4])
def test_losses_that_are_not_finite_end_as_rejected(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str, lambda_rl: float
) -> None:
    broken = DeltaNet(tiny_model.config)
    broken.load_state_dict(tiny_model.state_dict())
    broken.requires_grad_(False)
    broken.model.embeddings.weight[document[100]] = float("nan")
    config = small.replace(scope=scope, lambda_rl=lambda_rl)
    adapter, _ = refined(broken, document, config)
    manifest = adapter.manifest
    assert manifest["outcome"] == "rejected"
    assert "not finite" in manifest["result"]["reason"]
    json.dumps(manifest, allow_nan=False)


@pytest.mark.parametrize("scope", SCOPES)
def test_wild_learning_rates_end_clearly(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    config = small.replace(scope=scope, learning_rate=10.0, steps=6, patience=6)
    assert_clear_outcome(refined(tiny_model, document, config)[0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("branches", BRANCHES)
def test_same_seed_is_bit_for_bit_the_same(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str, branches: str
) -> None:
    config = small.replace(scope=scope, branches=branches)
    first, _ = refined(tiny_model, document, config, seed=11)
    second, _ = refined(tiny_model, document, config, seed=11)
    assert tensors_equal(first, second)
    assert first.manifest == second.manifest
    other, _ = refined(tiny_model, document, config, seed=12)
    assert other.manifest["result"] != first.manifest["result"]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_manifest_replays(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    adapter, _ = refined(tiny_model, document, small.replace(scope=scope), seed=2**63 + 5)
    manifest = json.loads(json.dumps(adapter.manifest))
    config = RefineConfig.from_dict(manifest["config"])
    tokens = adapter.tokens_T.tolist()
    assert tokens_sha256(adapter.tokens_T) == manifest["document_sha256"]
    replayed, _ = refined(tiny_model, tokens, config, seed=manifest["seed"])
    assert tensors_equal(replayed, adapter)
    assert replayed.manifest == adapter.manifest


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("branches", BRANCHES)
def test_probe_places_are_never_rolled_out(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str, branches: str
) -> None:
    config = small.replace(scope=scope, branches=branches, steps=6, patience=6)
    refiner = Refiner(tiny_model, document, config, seed=4)
    tried = [branches for quantum in refiner.run() for branches in quantum.branches or ()]
    assert refiner.adapter is not None
    places, excluded = probe_places(refiner.adapter.entropy_T, config, seed=4)
    assert len(places) == 8
    assert [branches["step"] for branches in tried] == [1, 2, 3, 4, 5, 6]
    for branches in tried:
        assert len(branches["positions"]) == config.positions
        for position in branches["positions"]:
            assert not bool(excluded[position : position + config.rollout_length].any())


@pytest.mark.parametrize("scope", SCOPES)
def test_two_studies_may_take_turns(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    config = small.replace(scope=scope, branches="mixed")
    texts = (document, document[7:130])
    alone = [refined(tiny_model, text, config, seed=i)[0] for i, text in enumerate(texts)]
    refiners = [Refiner(tiny_model, text, config, seed=i) for i, text in enumerate(texts)]
    running = [refiner.run() for refiner in refiners]
    while running:
        for quanta in list(running):
            if next(quanta, None) is None:
                running.remove(quanta)
    for refiner, right in zip(refiners, alone, strict=True):
        assert refiner.adapter is not None
        assert tensors_equal(refiner.adapter, right)


@pytest.mark.parametrize("scope", SCOPES)
def test_runs_the_same_where_the_caller_switched_gradients_off(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    config = small.replace(scope=scope, branches="mixed")
    right, _ = refined(tiny_model, document, config)
    refiner = Refiner(tiny_model, document, config)
    with torch.no_grad():
        for _ in refiner.run():
            assert not torch.is_grad_enabled()
    assert refiner.adapter is not None
    assert tensors_equal(refiner.adapter, right)


def test_may_be_stopped_between_any_two_quanta(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    config = small.replace(scope="lora", branches="mixed", steps=1)
    before = weights_hash(tiny_model)
    num = len(refined(tiny_model, document, config)[1])
    for stop in range(num):
        refiner = Refiner(tiny_model, document, config)
        quanta = refiner.run()
        for _ in range(stop):
            next(quanta)
        quanta.close()
        assert refiner.adapter is None
        assert torch.is_grad_enabled()
    assert weights_hash(tiny_model) == before


def test_events_carry_the_numbers_of_each_step(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    for scope in SCOPES:
        _, quanta = refined(tiny_model, document, small.replace(scope=scope))
        events = [quantum.event for quantum in quanta if quantum.event is not None]
        assert [event["step"] for event in events] == [1, 2, 3]
        for event in events:
            assert event["steps"] == 3
            assert event["num_positions"] == 3
            assert event["grad_norm"] > 0
            assert 0 <= event["reward_mean"] <= 1
            assert event["ntp_loss"] > 0
        phases = {quantum.phase for quantum in quanta}
        assert {"read", "rollout", "backward", "step", "gate"} <= phases


def test_no_quantum_is_longer_than_about_two_segments(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    for scope in SCOPES:
        config = small.replace(scope=scope, branches="mixed", segment_tokens=32, positions=6)
        _, quanta = refined(tiny_model, document, config)
        assert max(quantum.num_tokens for quantum in quanta) <= 2 * 2 * 32


def test_patience_stops_the_steps(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    # a step this small cannot move the probe, so every probe after the first ties
    config = small.replace(steps=50, learning_rate=0.0, patience=2)
    adapter, quanta = refined(tiny_model, document, config)
    assert sum(quantum.event is not None for quantum in quanta) <= 4
    assert not adapter.adapted


@pytest.mark.parametrize("scope", ["lora", "query_lora"])
def test_the_best_step_is_what_is_kept(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    # a rate large enough to overshoot
    config = small.replace(steps=8, scope=scope, learning_rate=0.3, patience=8, probe_confidence=0)
    adapter, _ = refined(tiny_model, document, config)
    result = adapter.manifest["result"]
    best = result["best_step"]
    assert adapter.delta is not None
    assert best < 8
    right, _ = refined(tiny_model, document, config.replace(steps=best))
    assert tensors_equal(adapter, right)
    places, _ = probe_places(adapter.entropy_T, config, seed=0)
    args = (tiny_model, adapter.tokens_T, places)
    probe = recall_probe(*args, adapter.state, config, delta=adapter.delta)
    assert probe.mean == pytest.approx(result["probe_after"], abs=1e-5)
    reader = DocumentReader(tiny_model, document, segment_tokens=64)
    list(reader.run())
    assert reader.adapter is not None
    base = recall_probe(*args, reader.adapter.state, config, delta=None)
    assert base.mean == pytest.approx(result["probe_before"], abs=1e-5)


def test_reading_in_small_segments_leaves_the_same_adapter(
    tiny_model64: DeltaNet, document: list[int]
) -> None:
    adapters = []
    for segment_tokens in (16, 64, 4096):
        reader = DocumentReader(tiny_model64, document, segment_tokens=segment_tokens)
        quanta = list(reader.run())
        assert len(quanta) == -(-200 // segment_tokens)
        adapters.append(reader.adapter)
    for adapter in adapters[1:]:
        assert adapter is not None
        assert adapters[0] is not None
        for got, right in zip(adapter.state.tensors(), adapters[0].state.tensors(), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
