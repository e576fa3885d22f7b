"""Our DeltaNet against what the reference implementation computed (tests/data/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from imprint.models.checkpoint import load_model
from imprint.models.config import DeltaNetConfig
from imprint.models.deltanet import DeltaNet

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAMES = ("delta_net", "delta_net_gate_negeig", "delta_net_short")


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference_implementation(name: str) -> None:
    model, golden = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    model.requires_grad_()
    tokens = golden["input_ids"].long()
    hidden, state = model(tokens)
    logits = model.logits(hidden)
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=2e-5)
    for index, layer in enumerate(state.layers):
        torch.testing.assert_close(layer["S"], golden[f"state.{index}.S"], rtol=0, atol=1e-6)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), abs=1e-5)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        right = golden[f"grad.{parameter_name}"]
        assert float((parameter.grad - right).norm()) < 1e-4 * float(right.norm()), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_reading_in_pieces_equals_the_reference(name: str) -> None:
    model, golden = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    tokens, state, pieces = golden["input_ids"].long(), None, []
    with torch.no_grad():
        for piece in tokens.split(17, 1):
            hidden, state = model(piece, state)
            pieces.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(pieces, 1), golden["logits"], rtol=0, atol=2e-5)


def test_parameters_of_the_default_config_are_those_of_the_public_checkpoint() -> None:
    with torch.device("meta"):
        model = DeltaNet(DeltaNetConfig())
    assert len(model.state_dict()) == 339
    assert sum(p.numel() for p in model.parameters()) == 1_365_677_056
