"""What the first steps leave out judges them, and is studied by the later ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.config import RefineConfig
from imprint.adapters.files import ProgressFolder
from imprint.adapters.gate import ProbeResult, probe_places
from imprint.adapters.held_out import REFUSAL, judge_held_out
from imprint.adapters.progress import Progress
from imprint.adapters.refine import Refiner
from imprint.models import DeltaNet


@pytest.fixture(scope="module")
def config(small: RefineConfig) -> RefineConfig:
    return small.replace(
        scope="query_lora",
        branches="recall",
        selection="write",
        positions=8,
        steps=6,
        held_steps=3,
        learning_rate=2e-2,
        lambda_rl=0.0,
        neutral_margin=10.0,
    )


def studied(model: DeltaNet, document: list[int], config: RefineConfig, **kwargs: Any) -> Refiner:
    refiner = Refiner(model, document, config, seed=3, **kwargs)
    list(refiner.run())
    assert refiner.adapter is not None
    return refiner


def test_only_places_that_were_held_out_count() -> None:
    config = RefineConfig(probe_confidence=2.0)
    base = ProbeResult(torch.full((8,), 3.0).double())
    better = torch.tensor([2.0, 9.0, 2.1, 9.0, 1.9, 9.0, 2.0, 9.0]).double()
    held_out = judge_held_out(base, ProbeResult(better), config, 0.5)
    assert held_out.passed
    assert held_out.gain_nats == pytest.approx(1.0)
    assert 0 < held_out.gain_error_nats < 0.1
    assert not judge_held_out(base, ProbeResult(better.roll(1)), config, 0.5).passed
    assert not judge_held_out(base, base, config, 0.5).passed


def test_the_first_steps_leave_out_what_the_later_ones_study(
    tiny_model: DeltaNet, document: list[int], config: RefineConfig
) -> None:
    refiner = Refiner(tiny_model, document, config, seed=3)
    tried = [entry["positions"] for quantum in refiner.run() for entry in quantum.branches or ()]
    writes: list[torch.Tensor] = []
    tiny_model(torch.tensor([document]), writes=writes)
    write_T = torch.stack(writes).mean(0)[0].detach()
    entropy_T = torch.ones(len(document))
    places, _ = probe_places(entropy_T, config, seed=3, write_T=write_T)
    assert refiner.adapter is not None
    result = refiner.adapter.manifest["result"]
    assert result["held_out_gain_nats"] > 0
    assert result["accepted"]
    length = config.rollout_length
    touched = [
        any(abs(p - place) < length for p in step for place in places[::2].tolist())
        for step in tried
    ]
    assert touched[:3] == [False] * 3
    assert any(touched[3:])


def test_a_study_that_harms_what_it_leaves_out_is_refused_at_once(
    tiny_model: DeltaNet, document: list[int], config: RefineConfig
) -> None:
    wild = config.replace(learning_rate=3.0, grad_clip=1e3)
    refiner = studied(tiny_model, document, wild)
    assert refiner.adapter is not None
    assert not refiner.adapter.adapted
    result = refiner.adapter.manifest["result"]
    assert result["reason"] == REFUSAL
    assert result["held_out_gain_nats"] < 0
    assert result["best_step"] <= 3  # the other steps are saved


def test_no_more_is_given_to_answers_than_what_was_held_out_bore(
    tiny_model: DeltaNet, document: list[int], config: RefineConfig
) -> None:
    whole = studied(tiny_model, document, config)
    assert whole.adapter is not None
    assert whole.adapter.manifest["result"]["alpha"] == 1.0
    refiner = Refiner(tiny_model, document, config, seed=3)
    for quantum in refiner.run():
        if quantum.event is not None and quantum.step == config.held_steps:
            assert refiner.held_out is not None
            refiner.held_out = dataclasses.replace(refiner.held_out, alpha=0.5)
    assert refiner.adapter is not None
    assert refiner.adapter.manifest["result"]["alpha"] == 0.5


@pytest.mark.parametrize(("num_tokens", "holds_out"), [(7, False), (9, True), (30, False)])
def test_documents_too_short_to_leave_anything_out_are_judged_by_what_they_study(
    tiny_model: DeltaNet,
    document: list[int],
    config: RefineConfig,
    num_tokens: int,
    holds_out: bool,
) -> None:
    refiner = studied(tiny_model, document[:num_tokens], config)
    assert refiner.adapter is not None
    result = refiner.adapter.manifest["result"]
    assert ("held_out_gain_nats" in result) == holds_out
    assert holds_out or result["reason"] != REFUSAL


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("rate", [2e-2, 3.0])
def test_the_trial_survives_the_process(
    tiny_model: DeltaNet,
    document: list[int],
    config: RefineConfig,
    tmp_path: Path,
    step: int,
    rate: float,
) -> None:
    config = config.replace(learning_rate=rate, grad_clip=1e3 if rate > 1 else 1.0)
    whole = studied(tiny_model, document, config)

    def progress() -> Progress:
        return Progress(ProgressFolder(tmp_path), "a", "m", lambda _: None)

    for quantum in Refiner(tiny_model, document, config, seed=3, progress=progress()).run():
        if quantum.event is not None and quantum.step == step:
            break
    again = studied(tiny_model, document, config, progress=progress())
    assert again.adapter is not None
    assert whole.adapter is not None
    assert again.adapter.manifest == whole.adapter.manifest
    mine, right = again.adapter.to_tensors(), whole.adapter.to_tensors()
    assert all(torch.equal(tensor, right[name]) for name, tensor in mine.items())
