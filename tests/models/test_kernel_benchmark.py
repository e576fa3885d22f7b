"""The work that the kernel benchmark counts is the work that the chunkwise rule does."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from imprint.models.kernel_benchmark import delta_rule_flops
from imprint.models.kernels.delta_rule import chunk_delta_rule


@pytest.mark.parametrize(("width", "chunk_size"), [(64, 32), (128, 64)])
def test_flops_are_those_of_the_products(width: int, chunk_size: int) -> None:
    heads, num_tokens = 2, 4 * chunk_size
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, num_tokens, width, generator=draw) for _ in "qkv")
    beta, state = torch.rand(1, heads, num_tokens), torch.zeros(1, heads, width, width)
    q.requires_grad_()  # the counter does not see products in place, which are those without it
    with FlopCounterMode(display=False) as counter:
        chunk_delta_rule(q, k, v, beta, state, chunk_size=chunk_size)
    expected = delta_rule_flops(num_tokens, heads, width, chunk_size)
    # the counter does not see the substitution in the smallest blocks of the inverse
    assert expected * 0.97 < counter.get_total_flops() <= expected
