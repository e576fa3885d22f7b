"""Muon as published: an orthogonalised step of a known size, with momentum and decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imprint.adapters.training.optimizers import Muon


@pytest.mark.parametrize("shape", [(24, 24), (24, 64), (64, 24)])
def test_a_step_is_nearly_orthogonal_whatever_the_gradient(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape) * 1e-3
    left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
    muon = Muon([parameter], weight_decay=0.0, dtype=torch.float32)
    muon.param_groups[0]["lr"] = 0.5
    muon.step()
    scale = 0.5 * 0.2 * max(shape) ** 0.5
    singular = torch.linalg.svdvals(parameter.detach()) / scale
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3
    # in the directions of the gradient, against it
    along = torch.diagonal(left.T @ parameter.detach() @ right.T) / scale
    assert float(along.max()) < -0.6


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_it_moves_as_torchs_own_does() -> None:
    """The same rule with other coefficients: directions agree, and so do momentum and decay."""
    torch.manual_seed(1)
    start, gradients = torch.randn(16, 32), torch.randn(3, 16, 32)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], weight_decay=0.1, dtype=torch.float32)
    mine.param_groups[0]["lr"] = 0.01
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for parameter, optimizer in ((ours, mine), (theirs, other)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, moved_too = (ours.detach() - start).flatten(), (theirs.detach() - start).flatten()
    assert float(torch.cosine_similarity(moved, moved_too, dim=0)) > 0.98
    assert float(moved.norm() / moved_too.norm()) == pytest.approx(1.0, abs=0.15)
    momentum, momentum_too = (
        o.state[p]["momentum_buffer"] for o, p in ((mine, ours), (other, theirs))
    )
    torch.testing.assert_close(momentum, momentum_too)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    Muon([parameter], weight_decay=0.1, dtype=torch.float32).step()
    assert bool((parameter == 1).all())
