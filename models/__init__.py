"""Fast-weight language models: state, layers, checkpoints, decoding; no REFINE, no HTTP.

Names that need torch are imported on first use, so that tokenizers and errors cost no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imprint.models.architecture import FastWeightModel
    from imprint.models.checkpoint import load_model, save_model, weights_hash
    from imprint.models.config import BUNDLED, DeltaNetConfig, GatedDeltaNetConfig, ModelConfig
    from imprint.models.deltanet import DeltaNet
    from imprint.models.errors import CheckpointError, ModelError
    from imprint.models.generate import decode, generate_greedy, prefill
    from imprint.models.lact_config import LactConfig
    from imprint.models.lora import LoraDelta
    from imprint.models.registry import build_model, load_config
    from imprint.models.sampling import (
        counter_uniform,
        counter_uniforms,
        penalize,
        sample_tokens,
        token_entropy,
        token_logprobs,
    )
    from imprint.models.state import RecurrentState
    from imprint.models.tokenizer import Tokenizer, load_tokenizer

_HOMES = {
    "architecture": ("FastWeightModel",),
    "checkpoint": ("load_model", "save_model", "weights_hash"),
    "config": ("BUNDLED", "DeltaNetConfig", "GatedDeltaNetConfig", "ModelConfig"),
    "deltanet": ("DeltaNet",),
    "errors": ("CheckpointError", "ModelError"),
    "generate": ("decode", "generate_greedy", "prefill"),
    "lact_config": ("LactConfig",),
    "lora": ("LoraDelta",),
    "registry": ("build_model", "load_config"),
    "sampling": (
        "counter_uniform",
        "counter_uniforms",
        "penalize",
        "sample_tokens",
        "token_entropy",
        "token_logprobs",
    ),
    "state": ("RecurrentState",),
    "tokenizer": ("Tokenizer", "load_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BUNDLED",
    "CheckpointError",
    "DeltaNet",
    "DeltaNetConfig",
    "FastWeightModel",
    "GatedDeltaNetConfig",
    "LactConfig",
    "LoraDelta",
    "ModelConfig",
    "ModelError",
    "RecurrentState",
    "Tokenizer",
    "build_model",
    "counter_uniform",
    "counter_uniforms",
    "decode",
    "generate_greedy",
    "load_config",
    "load_model",
    "load_tokenizer",
    "penalize",
    "prefill",
    "sample_tokens",
    "save_model",
    "token_entropy",
    "token_logprobs",
    "weights_hash",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
