"""Our LaCT against what the published code computed (tests/data/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from imprint.models.architecture import Read
from imprint.models.checkpoint import load_model
from imprint.models.lact import LactMixer
from imprint.models.lact_config import LactConfig

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
# Newton-Schulz iterations magnify the rounding of float32
LOGIT_TOLERANCE = {
    "lact_momentum_lowrank": 5e-6,
    "lact_plain_fullrank": 5e-6,
    "lact_muon_momentum_lowrank": 2e-5,
}


@pytest.mark.parametrize("name", LOGIT_TOLERANCE)
def test_models_equal_the_published_code(name: str) -> None:
    model, golden = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    model.requires_grad_()
    tokens = golden["input_ids"].long()
    hidden, _ = model(tokens)
    logits = model.logits(hidden)
    atol = LOGIT_TOLERANCE[name] * float(golden["logits"].abs().max())
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=atol)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), abs=1e-5)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if f"grad.{n}" in golden}
    assert all(".attn" not in n or n in grads for n, _ in model.named_parameters())
    for parameter_name, grad in grads.items():
        right = golden[f"grad.{parameter_name}"]
        tolerance = 1e-3 if "muon" in name else 1e-5
        assert float((grad - right).norm()) < tolerance * float(right.norm()), parameter_name


@pytest.mark.parametrize("piece_tokens", [1, 17])
@pytest.mark.parametrize("name", LOGIT_TOLERANCE)
def test_reading_in_pieces_equals_the_published_code(name: str, piece_tokens: int) -> None:
    model, golden = load_model(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    tokens, state, pieces = golden["input_ids"].long(), None, []
    with torch.no_grad():
        for piece in tokens.split(piece_tokens, 1):
            hidden, state = model(piece, state)
            pieces.append(model.logits(hidden))
    atol = LOGIT_TOLERANCE[name] * float(golden["logits"].abs().max())
    torch.testing.assert_close(torch.cat(pieces, 1), golden["logits"], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "variant", ["low_rank", "low_rank_muon", "raw_values", "plain", "other_switches"]
)
@pytest.mark.parametrize("piece_tokens", [35, 3])
def test_layers_equal_the_published_code_in_float64(variant: str, piece_tokens: int) -> None:
    path = GOLDEN / "lact_layers" / "golden.safetensors"
    with safe_open(path, "pt") as file:
        config = LactConfig(**json.loads(file.metadata()[variant]))
    tensors = {
        name.removeprefix(f"{variant}."): tensor
        for name, tensor in load_file(path).items()
        if name.startswith(f"{variant}.")
    }
    mixer = LactMixer(config, "layers.0.attn").double()
    parameters = {n.removeprefix("parameter."): t for n, t in tensors.items() if "parameter." in n}
    mixer.load_state_dict(parameters)
    x = tensors["x"].requires_grad_()
    state, pieces = mixer.init_state(x.shape[0], x.device, x.dtype), []
    for piece in x.split(piece_tokens, 1):
        y, state = mixer(piece, state, None, Read())
        pieces.append(y)
    y = torch.cat(pieces, 1)
    torch.testing.assert_close(y, tensors["y"], rtol=1e-9, atol=1e-9)
    (y * tensors["w"]).sum().backward()
    grads = {"x": x.grad, **{name: p.grad for name, p in mixer.named_parameters()}}
    for name, grad in grads.items():
        right = tensors[f"grad.{name}"]
        assert float((grad - right).norm()) < 1e-9 * float(right.norm()), name
