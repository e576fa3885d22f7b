"""Grown models compute what the shallower ones did, and can learn to do more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from imprint.adapters.training.growth import grow, is_deeper
from imprint.models import DeltaNet, DeltaNetConfig


def _model(num_layers: int) -> DeltaNet:
    model = DeltaNet(
        DeltaNetConfig(
            vocab_size=31, hidden_size=32, num_hidden_layers=num_layers, num_heads=2,
            intermediate_size=48,
        )
    )  # fmt: skip
    model.reset_parameters(4)
    return model


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 4), (3, 6)])
def test_a_grown_model_is_the_same_function(before: int, after: int) -> None:
    model = _model(before)
    grown = grow(model, after)
    tokens = torch.randint(0, 31, (2, 70), generator=torch.Generator().manual_seed(1))
    assert grown.config.num_hidden_layers == len(grown.mixers) == after
    torch.testing.assert_close(grown(tokens)[0], model(tokens)[0], rtol=0, atol=0)


def test_every_inserted_layer_gets_a_gradient() -> None:
    grown = grow(_model(3), 4).requires_grad_(True)
    tokens = torch.randint(0, 31, (2, 70), generator=torch.Generator().manual_seed(1))
    grown.lm_head(grown(tokens)[0]).square().sum().backward()
    still = {n for n, p in grown.named_parameters() if p.grad is None or not p.grad.any()}
    # what feeds the zero outputs starts to move once these are not zero any more
    assert {name for name in still if ".layers.2." not in name} == set()
    assert "model.layers.2.attn.o_proj.weight" not in still
    assert "model.layers.2.mlp.down_proj.weight" not in still


def test_only_more_layers_count_as_deeper() -> None:
    small, large = _model(2).config, _model(3).config
    assert is_deeper(large, than=small)
    assert not is_deeper(small, than=large)
    assert not is_deeper(small, than=small)
    assert not is_deeper(replace(large, hidden_size=64), than=small)
