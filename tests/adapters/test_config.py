"""RefineConfig: presets, round trips, and messages that name the field and its value."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from imprint.adapters.config import PRESETS, RefineConfig, config_of_focus, config_of_study
from imprint.adapters.errors import ConfigError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name: str) -> None:
    config = RefineConfig.preset(name)
    assert RefineConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_has_the_papers_numbers() -> None:
    paper = RefineConfig.preset("paper")
    assert (paper.positions, paper.rollout_length, paper.group_size) == (8, 5, 1)
    assert (paper.lambda_rl, paper.lambda_ntp, paper.learning_rate) == (0.4, 1.0, 1e-6)
    assert (paper.clip_low, paper.clip_high, paper.dual_clip) == (0.2, 0.2, 3.0)
    assert (paper.reward, paper.selection, paper.branches) == ("exact", "entropy", "continue")


def test_overrides_win_over_the_preset() -> None:
    assert RefineConfig.preset("fast", steps=2).steps == 2
    assert RefineConfig.from_dict({"steps": 2, "preset": "fast"}).probe_places == 16
    assert RefineConfig.preset("fast").replace(positions=3).positions == 3


def test_integers_may_stand_for_numbers_and_lists_for_tuples() -> None:
    config = RefineConfig.from_dict({"lambda_rl": 1, "steps": 3.0, "lora_targets": ["q_proj"]})
    assert isinstance(config.lambda_rl, float)
    assert isinstance(config.steps, int)
    assert config.lora_targets == ("q_proj",)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (4, 5), (5, 5), (6, 7)])
def test_smoothing_width_is_odd(length: int, width: int) -> None:
    assert RefineConfig(rollout_length=length).smoothing_width == width
    assert RefineConfig(smoothing=9).smoothing_width == 9


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"stepz": 1}, "stepz"),
        ({"preset": "best"}, "preset"),
        ({"preset": ["fast"]}, "preset"),
        ({"preset": "fast", "name": 1}, "name"),
        ({"scope": "some"}, "scope"),
        ({"scope": ["lora"]}, "scope"),
        ({"reward": "applause"}, "reward"),
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": "4"}, "steps"),
        ({"steps": None}, "steps"),
        ({"steps": float("inf")}, "steps"),
        ({"steps": float("nan")}, "steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": 10**400}, "learning_rate"),
        ({"steps": -(10**400)}, "steps"),
        ({"betas": [10**400, 0.9]}, "betas"),
        ({"learning_rate": {}}, "learning_rate"),
        ({"smoothing": 4}, "smoothing"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"blend_factors": []}, "blend_factors"),
        ({"blend_factors": [2.0]}, "blend_factors"),
        ({"lora_targets": [3]}, "lora_targets"),
        ({"lora_targets": ["x"] * 65}, "lora_targets"),
        ({"lambda_rl": 0, "lambda_ntp": 0}, "lambda_rl"),
        ({"preset": "fast", "reward": "exact"}, "reward"),
        ({"preset": "focus", "clip_low": 0.1}, "clip_low"),
        ({"positions": 1024, "group_size": 256, "rollout_length": 256}, "positions"),
    ],
)
def test_unusable_values_name_their_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        RefineConfig.from_dict(values)
    assert caught.value.field == field


def test_rollouts_are_told_about_where_the_preset_draws_none() -> None:
    with pytest.raises(ConfigError, match=r"give lambda_rl as well, such as 0\.4"):
        RefineConfig.preset("fast", group_size=4)
    assert RefineConfig.preset("fast", group_size=4, lambda_rl=0.2).group_size == 4
    assert RefineConfig.preset("fast").replace(steps=2, group_size=4).lambda_rl == 0


def test_needs_no_torch() -> None:
    code = "import sys, imprint.adapters.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fields", [{"steps": 0}, {"preset": "drafts"}])
def test_only_a_focus_takes_no_step(fields: dict[str, Any]) -> None:
    assert config_of_focus(fields).steps == 0
    with pytest.raises(ConfigError, match="one step or more") as error:
        config_of_study(fields)
    assert error.value.field == "steps"
