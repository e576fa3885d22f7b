"""The optimizer of studies: torch's numbers, without what torch's own loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imprint.adapters.optimizer import AdamW

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}


def parameters() -> list[Tensor]:
    """Three, of two types."""
    draw = torch.Generator().manual_seed(0)
    shapes = (((3, 5), torch.float32), ((7,), torch.float32), ((2, 3), torch.float64))
    made = [torch.randn(shape, generator=draw, dtype=dtype) for shape, dtype in shapes]
    return [tensor.requires_grad_() for tensor in made]


def move(optimizer: AdamW | torch.optim.AdamW, mine: list[Tensor], steps: range) -> None:
    """Gradients of their steps; the second parameter has none in the first step."""
    for step in steps:
        optimizer.zero_grad()
        draw = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(mine):
            grad = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            parameter.grad = None if (number, step) == (1, 0) else grad
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_moves_as_torchs_does(weight_decay: float) -> None:
    mine, right = parameters(), parameters()
    options = {**OPTIONS, "weight_decay": weight_decay}
    move(AdamW(mine, **options), mine, range(5))
    move(torch.optim.AdamW(right, **options), right, range(5))
    for moved, expected in zip(mine, right, strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-7)


def test_it_goes_on_bit_for_bit_from_its_state() -> None:
    right, mine = parameters(), parameters()
    move(AdamW(right, **OPTIONS), right, range(4))
    first = AdamW(mine, **OPTIONS)
    move(first, mine, range(1))
    assert set(first.state()) == {0, 2}
    second = AdamW(mine, **OPTIONS)
    second.restore(first.state())
    move(second, mine, range(1, 4))
    assert all(map(torch.equal, mine, right))


def test_without_gradients_nothing_moves() -> None:
    mine = parameters()
    AdamW(mine, **OPTIONS).step()
    assert all(map(torch.equal, mine, parameters()))


def test_neither_loading_nor_studying_loads_torchs_compiler(tiny_checkpoint: Path) -> None:
    code = """
import sys
from imprint.adapters.config import RefineConfig
from imprint.adapters.refine import Refiner
from imprint.models import load_model
model = load_model(sys.argv[1])
refiner = Refiner(model, [1, 2, 3, 4] * 20, RefineConfig(steps=1))
assert any(quantum.event for quantum in refiner.run())
sys.exit("torch._dynamo" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
