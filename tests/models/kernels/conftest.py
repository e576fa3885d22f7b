"""Kernels run in Triton's interpreter where there is no GPU, and not at all without Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `poisoned_memory` on a GPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any is imported


@pytest.fixture
def interpreter() -> None:
    """For tests of kernels on the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here; the tests marked gpu run them")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a test of kernels runs: in the interpreter, and on a GPU."""
    device: str = request.param
    if device == "cpu":
        request.getfixturevalue("interpreter")
    return device


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN (integers their largest value) until something is written to them."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
