"""What a reading keeps for the backward pass stays below what the model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models.config import DeltaNetConfig, GatedDeltaNetConfig, ModelConfig
from imprint.models.lact_config import LactConfig
from imprint.models.lora import LoraDelta
from imprint.models.registry import build_model

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2}
CONFIGS: dict[str, ModelConfig] = {
    "delta_net": DeltaNetConfig(**SIZES, num_heads=4),
    "gated_deltanet": GatedDeltaNetConfig(**SIZES, num_heads=4, head_dim=64, expand_v=1.0),
    "gated_deltanet_wide": GatedDeltaNetConfig(**SIZES, num_heads=3, head_dim=64, expand_v=2.0),
    "lact": LactConfig(
        **SIZES,
        num_attn_heads=4,
        num_lact_heads=2,
        lact_chunk_size=64,
        window_size=128,
        w0_w2_low_rank=8,
        use_muon=True,
    ),
    "lact_in_one_chunk": LactConfig(
        **SIZES,
        num_attn_heads=4,
        num_lact_heads=2,
        lact_chunk_size=256,
        window_size=256,
        use_momentum=False,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_bounded(name: str) -> None:
    model = build_model(CONFIGS[name])
    model.reset_parameters(0)
    model.requires_grad_(False)
    delta = LoraDelta.init(model.lora_targets(), 8, seed=0).requires_grad_()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    num_tokens = 256
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = model(torch.zeros(1, num_tokens, dtype=torch.long), delta=delta)
    assert hidden.requires_grad
    num_bytes = sum(s.nbytes() for pointer, s in kept.items() if pointer not in parameters)
    told = 4 * model.activation_floats(num_tokens)
    assert 0.5 * told < num_bytes < told
