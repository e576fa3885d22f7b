"""Small random LaCT models of every option, and the plain computation to compare them with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from imprint.models.lact import LaCT
from imprint.models.lact_config import LactConfig

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
    "lact_chunk_size": 8,
    "window_size": 8,
    "rope_theta": 100.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "momentum_low_rank": {"w0_w2_low_rank": 3},
    "plain_full_rank": {"use_momentum": False, "no_v_silu": True, "window_size": 5},
    "muon": {"w0_w2_low_rank": 3, "use_muon": True, "inter_multi": 1.5, "window_size": 12},
    "muon_narrow": {"use_muon": True, "use_momentum": False, "inter_multi": 0.5, "window_size": 1},
    "odd_options": {
        "qkv_bias": True,
        "attn_qk_norm": True,
        "qkv_silu": False,
        "ttt_nope": True,
        "learnable_ttt_scale": False,
        "num_lact_heads": 1,
        "tie_word_embeddings": True,
    },
    "chunk_of_one": {"lact_chunk_size": 1, "window_size": 3},
}


def _build(**options: Any) -> LaCT:
    model = LaCT(LactConfig(**{**SIZES, **options})).double().eval()
    model.reset_parameters(7)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("qk_scale", "qk_offset", ".bias")):
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.add_(0.3 * noise)
            if name.endswith("lr_proj.bias"):
                parameter.add_(5.5)  # learning rates around 0.2, so that steps matter
    return model


@pytest.fixture(scope="session")
def build_lact() -> Callable[..., LaCT]:
    """Makes a small LaCT in float64, none of whose parameters is where it would start."""
    return _build


@pytest.fixture(params=VARIANTS)
def lact(request: pytest.FixtureRequest) -> LaCT:
    """One model for each set of options."""
    return _build(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The plain computation in oracle.py."""
    path = Path(__file__).with_name("oracle.py")
    spec = importlib.util.spec_from_file_location("imprint_lact_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
