"""Compiles for a GPU, without one, what the self-check of the Triton kernels would launch there.

`python -m support.compiled_kernels CAPABILITY` (90 is Hopper) writes a line of JSON for each form
of each kernel: its name, and the bytes of shared memory that one program takes. Nothing runs:
results are what lay in memory. Triton brings NVIDIA's assembler.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Target:
    """A GPU that can be compiled for: what Triton asks of its driver then."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int) -> None:
    triton.runtime.driver.set_active(Target(capability))
    compiled = set()
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        if kernel.hash not in compiled:
            compiled.add(kernel.hash)
            form = {"kernel": self.fn.__name__, "shared": kernel.metadata.shared}
            sys.stdout.write(json.dumps(form) + "\n")
        return kernel

    JITFunction.run = compile_only
    from imprint.models.kernels import self_check, triton_pool_step
    from imprint.models.kernels.pool_step import find_error

    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        self_check.errors_by_kernel(cpu, dtype)
    find_error(triton_pool_step.pool_step, (2, 128, 128), cpu)


if __name__ == "__main__":
    main(int(sys.argv[1]))
