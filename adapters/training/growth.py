"""A deeper model that starts as the same function as a shallower one."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from imprint.models.config import DeltaNetConfig
from imprint.models.deltanet import DeltaNet

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_OUTPUTS = (".attn.o_proj.weight", ".mlp.down_proj.weight")


def is_deeper(config: DeltaNetConfig, than: DeltaNetConfig) -> bool:
    """Whether `config` is `than` with more layers."""
    same = replace(than, num_hidden_layers=config.num_hidden_layers) == config
    return same and config.num_hidden_layers > than.num_hidden_layers


@torch.no_grad()
def grow(model: DeltaNet, num_layers: int) -> DeltaNet:
    """A model of `num_layers` layers that computes what `model` does.

    A layer at a time is inserted behind the middle one: its copy, except that it adds nothing to
    the stream yet, because its outputs' weights are zero (block expansion, arXiv 2401.02415).
    """
    while (num_old := model.config.num_hidden_layers) < num_layers:
        middle = num_old // 2
        grown = DeltaNet(replace(model.config, num_hidden_layers=num_old + 1))
        old = model.state_dict()
        for name, tensor in grown.state_dict().items():
            layer = _LAYER.search(name)
            number = int(layer[1]) if layer else 0
            if number <= middle:
                tensor.copy_(old[name])
            elif number == middle + 1 and name.endswith(_OUTPUTS):
                tensor.zero_()
            else:
                tensor.copy_(old[_LAYER.sub(f".layers.{number - 1}.", name)])
        model = grown
    return model
