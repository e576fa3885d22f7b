"""From the `model_type` of a config.json to its config class and its model class.

Imports no torch until a model is built, so the HTTP process can check a checkpoint's config.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from imprint.models.config import DeltaNetConfig, GatedDeltaNetConfig, ModelConfig
from imprint.models.errors import CheckpointError
from imprint.models.lact_config import LactConfig

if TYPE_CHECKING:
    from imprint.models.architecture import FastWeightModel


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where an architecture is written down."""

    config_class: type[ModelConfig]
    module: str
    """Module under `imprint.models` that holds the model; imported when one is built."""
    class_name: str


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "delta_net": Architecture(DeltaNetConfig, "deltanet", "DeltaNet"),
    "gated_deltanet": Architecture(GatedDeltaNetConfig, "gated_deltanet", "GatedDeltaNet"),
    "lact_swiglu": Architecture(LactConfig, "lact", "LaCT"),
}
"""Architectures by `model_type`."""


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The checked config of a config.json's content. Raises CheckpointError naming the key."""
    if "model_type" not in raw:
        raise CheckpointError("config: model_type is missing; it names the architecture")
    architecture = ARCHITECTURES.get(str(raw["model_type"]))
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(
            f"config: model_type {raw['model_type']!r} is not supported (supported: {known})"
        )
    return architecture.config_class.from_dict(raw)


def load_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json. Raises CheckpointError if it is missing or cannot be used."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no config.json; give the folder of a checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return parse_config(raw)


def build_model(config: ModelConfig) -> FastWeightModel:
    """A model of `config` whose parameters are not set yet, on torch's default device."""
    architecture = ARCHITECTURES[config.model_type]
    module = importlib.import_module(f"imprint.models.{architecture.module}")
    model: FastWeightModel = getattr(module, architecture.class_name)(config)
    return model
