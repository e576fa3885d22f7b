"""One training run on one device or on several: who has which documents, whose gradients count.

Beyond one device, parameters, gradients and optimizer are sharded by FSDP2, started by torchrun. An
update gathers the parameters once, and its last backward pass reduces the gradients; in between,
ranks run what they like, because branches make the number of passes differ from rank to rank.
Limit: nothing of models or methods.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class World:
    """The processes of this run; one, unless torchrun started more."""

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device(device)
        if self.size > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def shard(self, model: nn.Module, layers: list[nn.Module]) -> None:
        """Split the parameters over the processes, layer by layer."""
        if self.size > 1:
            # modules return views, on which nobody works in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            mesh = init_device_mesh(self.device.type, (self.size,))
            for module in (*layers, model):
                fully_shard(module, mesh=mesh, reshard_after_forward=False)

    @contextmanager
    def gathering(self, model: nn.Module, touch: Callable[[], Tensor]) -> Iterator[None]:
        """An update's passes. Afterwards `.grad` holds the sum over all processes, or its shard.

        `touch` runs the whole model on something small; its backward pass is the reducing one.
        """
        if not isinstance(model, FSDPModule):
            yield
            return
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)
        yield
        model.set_requires_gradient_sync(True)
        model.set_reshard_after_backward(True)
        (touch() * 0).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.size)  # reducing took the mean

    def total(self, values: dict[str, float]) -> dict[str, float]:
        """Each value, summed over the processes; all must name the same."""
        if self.size == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        return self.total({"flag": float(flag)})["flag"] > 0


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, whole."""
    full: Callable[[], Tensor] | None = getattr(value, "full_tensor", None)
    return value if full is None else full()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight, on the host of the leading process; all processes must call it."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=_WHOLE))


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, likewise."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Give each process its part of a `whole_optimizer`.

    Weights that had had no gradient by then have no part in it, and none after: LaCT's learning
    rates have none until a chunk is complete.
    """
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    for name, weight in model.named_parameters():
        if name not in state["state"]:  # torch has made it a state that has seen a step
            optimizer.state.pop(weight, None)
