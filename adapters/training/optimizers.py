"""What moves the weights in pre-training: Muon inside the layers, AdamW around them."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor, nn

from imprint.adapters.training.checkpoints import OptimizerState
from imprint.adapters.training.config import PretrainConfig
from imprint.models.deltanet import DeltaNet
from imprint.models.kernels.lact import orthogonalize

_MOMENTUM = 0.95
_RMS = 0.2  # of an update, as AdamW's usually is


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (K. Jordan, 2024), scaled to the size of AdamW's updates
    (arXiv 2502.16982).

    torch's own iterates in bfloat16 whatever the weights are, which is most of a step's time on a
    processor without instructions for it.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, weight_decay: float, dtype: torch.dtype
    ) -> None:
        """For matrices only; they are orthogonalised in `dtype`."""
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. Parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: nn.Parameter, rate: float, weight_decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, _MOMENTUM), self._dtype)
        parameter.mul_(1 - rate * weight_decay)
        parameter.add_(update, alpha=-rate * _RMS * sqrt(max(parameter.shape)))


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for everything else, one learning rate."""

    def __init__(self, model: DeltaNet, config: PretrainConfig) -> None:
        inner: list[nn.Parameter] = []
        outer: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and min(parameter.shape) > 16
            (inner if is_matrix and "layers" in name else outer).append(parameter)
        dtype = torch.bfloat16 if config.autocast else torch.float32
        self.parts: list[torch.optim.Optimizer] = [
            Muon(inner, weight_decay=config.weight_decay, dtype=dtype),
            torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> OptimizerState:
        states = [part.state_dict() for part in self.parts]
        return {
            "state": {
                f"{number}.{index}": fields
                for number, state in enumerate(states)
                for index, fields in state["state"].items()
            },
            "param_groups": [state["param_groups"] for state in states],
        }

    def restore(self, state: OptimizerState) -> None:
        for number, part in enumerate(self.parts):
            own = {
                int(name.partition(".")[2]): fields
                for name, fields in state["state"].items()
                if name.startswith(f"{number}.")
            }
            part.load_state_dict({"state": own, "param_groups": state["param_groups"][number]})
