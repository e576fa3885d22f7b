"""AdamW for what a study trains: elementwise, so several deltas in one tensor never mix.

The same numbers as `torch.optim.AdamW`, whose first use loads torch's compiler: more than a second
in every worker process. One rate for all parameters; training of whole models does not use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        self._steps = [0] * len(self._parameters)
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
            self._steps[i] += 1
            if i not in self._moments:
                mean = torch.zeros_like(self._parameters[i])
                self._moments[i] = mean, torch.zeros_like(mean)
        parameters = [self._parameters[i] for i in moved]
        grads = [grad for parameter in parameters if (grad := parameter.grad) is not None]
        means, squares = (
            list(kind) for kind in zip(*(self._moments[i] for i in moved), strict=True)
        )
        mean_beta, square_beta = self._betas
        if self._weight_decay:
            torch._foreach_mul_(parameters, 1 - self._lr * self._weight_decay)
        torch._foreach_lerp_(means, grads, 1 - mean_beta)
        torch._foreach_mul_(squares, square_beta)
        torch._foreach_addcmul_(squares, grads, grads, 1 - square_beta)
        steps = [self._steps[i] for i in moved]
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, [(1 - square_beta**step) ** 0.5 for step in steps])
        torch._foreach_add_(scales, EPS)
        sizes = [-self._lr / (1 - mean_beta**step) for step in steps]
        torch._foreach_addcdiv_(parameters, means, scales, sizes)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Number of steps and both moments, by the index of each parameter that has moved."""
        return {
            i: {"step": torch.tensor(float(self._steps[i])), "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in self._moments.items()
        }

    def restore(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Go on from a `state`, whose tensors may be on another device."""
        for i, kept in state.items():
            self._steps[i] = int(kept["step"])
            mean, square = (torch.empty_like(self._parameters[i]) for _ in range(2))
            mean.copy_(kept["exp_avg"])
            square.copy_(kept["exp_avg_sq"])
            self._moments[i] = (mean, square)
