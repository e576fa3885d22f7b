"""AdamW for what a study trains: elementwise, so several deltas in one tensor never mix.

Torch's own function does the arithmetic. `torch.optim.AdamW`, which calls it as well, loads torch's
compiler at its first use: more than a second in every worker process. Limit: one rate for all
parameters; training of whole models does not use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

EPS = 1e-8


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019) over Adam's two moments."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """`lr` is the rate of every step; `weight_decay` is a share of a weight, times the rate."""
        self._parameters = list(parameters)
        self._lr, self._betas, self._weight_decay = lr, betas, weight_decay
        self._steps = [torch.tensor(0.0) for _ in self._parameters]
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient; the others stay as they are."""
        moved = [i for i, parameter in enumerate(self._parameters) if parameter.grad is not None]
        if not moved:
            return
        for i in moved:
            if i not in self._moments:
                mean = torch.zeros_like(self._parameters[i])
                self._moments[i] = mean, torch.zeros_like(mean)
        parameters = [self._parameters[i] for i in moved]
        adamw(
            parameters,
            [grad for parameter in parameters if (grad := parameter.grad) is not None],
            [self._moments[i][0] for i in moved],
            [self._moments[i][1] for i in moved],
            [],
            [self._steps[i] for i in moved],
            foreach=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=self._lr,
            weight_decay=self._weight_decay,
            eps=EPS,
            maximize=False,
        )

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Number of steps and both moments, by the index of each parameter that has moved."""
        return {
            i: {"step": self._steps[i].clone(), "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in self._moments.items()
        }

    def restore(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Go on from a `state`, whose tensors may be on another device."""
        for i, kept in state.items():
            self._steps[i] = kept["step"].cpu().clone()
            mean, square = (torch.empty_like(self._parameters[i]) for _ in range(2))
            mean.copy_(kept["exp_avg"])
            square.copy_(kept["exp_avg_sq"])
            self._moments[i] = (mean, square)
