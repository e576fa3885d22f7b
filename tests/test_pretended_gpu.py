"""What needs a GPU runs on a pretended one where there is none: `support/pretended_gpu.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
ON_IT = (
    "test_pretended_gpu.py",
    "adapters/test_step_benchmark.py",
    "adapters/training/test_refine_train.py",
    "models/test_pool_decoder.py",
    "models/kernels/test_model_on_triton.py",
    "server/test_engine_architectures.py",
)
"""The others compare kernels with their twins, as the interpreter does on the host."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, real or pretended")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_needs_a_gpu_runs_on_a_pretended_one() -> None:
    plugin = ["-p", "support.pretended_gpu", "-p", "no:cacheprovider", "-m", "gpu", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, *(str(TESTS / name) for name in ON_IT)],
        env=os.environ | {"PYTHONPATH": str(TESTS), "IMPRINT_KERNELS": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.gpu
def test_gradients_are_those_of_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in "xw")
    grads = []
    for device in ("cpu", "cuda"):
        weight = w.to(device, copy=True).requires_grad_()
        (x.to(device) @ weight).softmax(-1)[:, 0].sum().backward()
        assert weight.grad is not None
        assert weight.grad.device.type == device
        grads.append(weight.grad.cpu())
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
def test_host_and_device_do_not_mix() -> None:
    here, there = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    with pytest.raises(RuntimeError):
        here + there
    with pytest.raises(RuntimeError):
        there[torch.zeros(1, dtype=torch.long, device="cuda")]
    with pytest.raises(TypeError):
        here.numpy()
    assert torch.equal((here + torch.tensor(1.0)).cpu(), there + 1)
    assert here[torch.tensor([1])].tolist() == [[1.0] * 3]


@pytest.mark.gpu
def test_a_graph_computes_again_on_the_same_memory() -> None:
    given = torch.zeros(3, device="cuda")
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    given + 1  # a first use may not be in a graph
    with torch.cuda.graph(first):
        made = (given + 1)[1:] * 2
    with torch.cuda.graph(second, pool=first.pool()):
        given *= 3
    for number, right in ((1.0, 4.0), (2.0, 6.0)):
        given.copy_(torch.full((3,), number))
        first.replay()
        assert made.tolist() == [right] * 2
    second.replay()
    assert given.tolist() == [6.0] * 3


@pytest.mark.gpu
def test_graphs_share_their_memory() -> None:
    if "pretended" not in torch.cuda.get_device_name():
        pytest.skip("whether they do is the allocator's to decide")
    given = torch.zeros(3, device="cuda")
    graphs, made = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            made.append(given + 1)
    graphs[0].replay()
    assert made[0].tolist() == [1.0] * 3
    graphs[1].replay()
    assert made[0].isnan().all()
    assert (given.tolist(), made[1].tolist()) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("broken", ["wait", "move up", "move down", "fill", "mask"])
def test_a_graph_neither_waits_nor_takes_numbers_from_the_host(broken: str) -> None:
    if "pretended" not in torch.cuda.get_device_name():
        pytest.skip("leaves a real device in the middle of a capture")
    here, there = torch.ones(3, device="cuda"), torch.ones(3)
    work = {
        "wait": here.sum().item,
        "move up": lambda: there.to("cuda"),
        "move down": here.cpu,
        "fill": lambda: here.copy_(there),
        "mask": lambda: here[here > 0],
    }
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        work[broken]()
