"""A learning rate for each document: chosen by the probe, paid for, and the same when taken up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.config import RefineConfig
from imprint.adapters.errors import ConfigError
from imprint.adapters.evaluation.compute import next_token_config, token_passes
from imprint.adapters.files import ProgressFolder
from imprint.adapters.focus import Focus
from imprint.adapters.progress import Progress
from imprint.adapters.refine import Refiner
from imprint.adapters.trials import Trial, best_rate
from imprint.models import DeltaNet

RATES = [1e-4, 1e-2, 5.0]


def studied(model: DeltaNet, document: list[int], config: RefineConfig, **more: Any) -> Refiner:
    refiner = Refiner(model, document, config, seed=3, **more)
    for _ in refiner.run():
        pass
    return refiner


def content(refiner: Refiner) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    assert refiner.adapter is not None
    tensors = refiner.adapter.to_tensors()
    return {name: tensor.tolist() for name, tensor in tensors.items()}, refiner.adapter.manifest


@pytest.mark.parametrize("scope", ["query_lora", "lora"])
def test_a_study_with_a_chosen_rate_is_the_study_with_that_rate(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    config = small.replace(scope=scope, learning_rates=RATES, learning_rate=1.0, trial_steps=2)
    tensors, manifest = content(studied(tiny_model, document, config))
    result = manifest["result"]
    assert [trial["learning_rate"] for trial in result["trials"]] == RATES
    nats = {trial["learning_rate"]: trial["probe_nats"] for trial in result["trials"]}
    rate = result["learning_rate"]
    assert nats[rate] == min(nats.values())
    plain = small.replace(scope=scope, learning_rate=rate)
    right, single = content(studied(tiny_model, document, plain))
    assert tensors == right
    assert all(result[name] == value for name, value in single["result"].items())
    # the trials are paid for: three of two steps, beside one of three and what surrounds it
    spent, alone = (sum(m["usage"].values()) for m in (manifest, single))
    assert 1.3 * alone < spent < 4 * alone


def test_a_study_ended_while_it_tries_or_later_chooses_the_same(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, tmp_path: Path
) -> None:
    config = small.replace(learning_rates=RATES[:2], steps=2)
    right = content(studied(tiny_model, document, config))
    folder = ProgressFolder(tmp_path)
    ends = [4, 9, 20, 10_000]  # quanta: while reading and trying, then later
    for end in ends:
        progress = Progress(folder, "a", "m", lambda outcome: None)
        refiner = Refiner(tiny_model, document, config, seed=3, progress=progress)
        quanta = refiner.run()
        for _, _quantum in zip(range(end), quanta, strict=False):
            pass
        quanta.close()  # type: ignore[attr-defined]
        if refiner.adapter is not None:
            break
    assert content(refiner) == right


def test_a_rate_that_breaks_the_numbers_is_not_chosen(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    assert best_rate([Trial(1.0, None), Trial(2.0, 0.5), Trial(3.0, 0.5)]) == 2.0
    assert best_rate([Trial(1.0, None)]) is None
    assert best_rate([Trial(1.0, 0.0), Trial(2.0, 0.1)]) == 1.0
    with torch.no_grad():
        broken = studied(tiny_model, document, small.replace(learning_rates=[1e-2], grad_clip=1e-6))
    assert broken.adapter is not None
    assert broken.adapter.manifest["result"]["learning_rate"] == 1e-2


def test_next_token_training_pays_for_its_trials(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> None:
    config = small.replace(learning_rates=RATES[:2], steps=6, patience=6, group_size=4)
    study = studied(tiny_model, document, config)
    budget = token_passes(study.usage)
    plain = next_token_config(config, num_tokens=len(document), num_places=8, budget=budget)
    spent = token_passes(studied(tiny_model, document, plain).usage)
    assert spent == pytest.approx(budget, rel=0.2)


def test_what_cannot_be_tried_is_refused(read_adapter: Any, tiny_model: DeltaNet) -> None:
    for rates in ([1e-3] * 9, [-1.0], [11.0]):
        with pytest.raises(ConfigError, match="learning_rates"):
            RefineConfig.from_dict({"learning_rates": rates})
    focus = RefineConfig.preset("focus", learning_rates=[1e-3])
    with pytest.raises(ConfigError, match="focus tries no learning_rates"):
        Focus(tiny_model, read_adapter, [[5, 6]], focus)
