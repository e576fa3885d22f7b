"""Our models against what the reference implementations computed (tests/data/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from imprint.models.checkpoint import load_model
from imprint.models.config import DeltaNetConfig, GatedDeltaNetConfig, ModelConfig
from imprint.models.registry import build_model

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
STATE_TOLERANCE = {
    "delta_net": 1e-6,
    "delta_net_gate_negeig": 1e-6,
    "delta_net_short": 1e-6,
    "delta_net_no_conv_no_beta": 5e-6,
    "gated_deltanet": 1e-6,
    "gated_deltanet_expand1": 1e-6,
    "gated_deltanet_grouped": 5e-6,
    "gated_deltanet_no_conv": 5e-6,
}


def assert_same_logits(got: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(got, right, rtol=0, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("name", STATE_TOLERANCE)
def test_equals_the_reference_implementation(name: str) -> None:
    model, golden = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    model.requires_grad_()
    tokens = golden["input_ids"].long()
    hidden, state = model(tokens)
    logits = model.logits(hidden)
    assert_same_logits(logits, golden["logits"])
    for index, layer in enumerate(state.layers):
        right = golden[f"state.{index}.S"]
        torch.testing.assert_close(layer["S"], right, rtol=0, atol=STATE_TOLERANCE[name])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), abs=1e-5)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if f"grad.{n}" in golden}
    assert all(".attn" not in n or n in grads for n, _ in model.named_parameters())
    for parameter_name, grad in grads.items():
        right = golden[f"grad.{parameter_name}"]
        tolerance = 1e-3 if parameter_name.endswith(("A_log", "dt_bias")) else 1e-4
        assert float((grad - right).norm()) < tolerance * float(right.norm()), parameter_name


@pytest.mark.parametrize("piece_tokens", [1, 17])
@pytest.mark.parametrize("name", STATE_TOLERANCE)
def test_reading_in_pieces_equals_the_reference(name: str, piece_tokens: int) -> None:
    model, golden = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    tokens, state, pieces = golden["input_ids"].long(), None, []
    with torch.no_grad():
        for piece in tokens.split(piece_tokens, 1):
            hidden, state = model(piece, state)
            pieces.append(model.logits(hidden))
    assert_same_logits(torch.cat(pieces, 1), golden["logits"])


PUBLIC: dict[str, tuple[ModelConfig, int, int]] = {
    "fla-hub/delta_net-1.3B-100B": (DeltaNetConfig(), 339, 1_365_677_056),
    "m-a-p/1.3B-100B-GatedDeltaNet-pure": (
        GatedDeltaNetConfig(num_hidden_layers=24, num_heads=8, expand_v=1.0),
        435,
        1_466_343_808,
    ),
    "Gated DeltaNet with fla's defaults": (GatedDeltaNetConfig(), 381, 1_387_348_732),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_number_of_parameters_is_that_of_the_public_checkpoint(name: str) -> None:
    config, num_tensors, num_parameters = PUBLIC[name]
    with torch.device("meta"):
        model = build_model(config)
    assert len(model.state_dict()) == num_tensors
    assert sum(p.numel() for p in model.parameters()) == num_parameters
