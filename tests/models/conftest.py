"""Fixtures for models: tiny random ones of several architectures."""

from __future__ import annotations

from typing import Any

import pytest

from imprint.models.architecture import FastWeightModel
from imprint.models.config import DeltaNetConfig, GatedDeltaNetConfig, ModelConfig
from imprint.models.lact_config import LactConfig
from imprint.models.registry import build_model

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, ModelConfig] = {
    "delta_net": DeltaNetConfig(**SIZES, num_heads=2),
    "gated_deltanet": GatedDeltaNetConfig(
        **SIZES, num_heads=1, num_v_heads=2, head_dim=16, expand_v=1.0
    ),
    "lact_swiglu": LactConfig(
        **SIZES,
        num_attn_heads=4,
        num_lact_heads=2,
        lact_chunk_size=8,
        window_size=12,
        w0_w2_low_rank=4,
    ),
}


@pytest.fixture(scope="session", params=CONFIGS)
def any_model64(request: pytest.FixtureRequest) -> FastWeightModel:
    """A model of each architecture in turn, frozen, in float64; its vocabulary is 257."""
    model = build_model(CONFIGS[request.param])
    model.reset_parameters(1)
    return model.double().eval().requires_grad_(False)
