"""The Triton kernels compile for GPUs, which the interpreter does not tell, and fit into them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
SHARED_BYTES = {89: 99 << 10, 90: 227 << 10}
"""Shared memory that one program may take, by compute capability: CUDA C++ Programming Guide."""
KERNELS = {
    *("_shrink", "_expand", "_outer", "_statistics", "_logit_grads"),
    *("_attend", "_inner", "_output", "_pool_step"),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled_kernels", str(capability)],
        env=environment | {"PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {form["kernel"] for form in found} == KERNELS
    too_large = [form for form in found if form["shared"] > SHARED_BYTES[capability]]
    assert not too_large
