"""Building blocks against their formulas and against torch's own operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imprint.models.layers import RMSNorm, ShortConvolution, l2_normalize


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-3, 1.0, 1e3])
def test_l2_epsilon_is_inside_the_root(scale: float) -> None:
    x = scale * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(l2_normalize(x), right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_rms_norm(scale: float) -> None:
    norm = RMSNorm(6, 1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
    x = scale * torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), right, rtol=1e-12, atol=1e-15)


def test_norms_compute_in_float32_and_keep_the_type() -> None:
    x = 300 * torch.ones(1, 4096, dtype=torch.bfloat16)
    norm = RMSNorm(4096, 1e-6).to(torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), torch.ones_like(x))
    assert l2_normalize(x).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 4, 6, 7, 24])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17])
def test_convolution_equals_its_definition(size: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(size)
    conv = ShortConvolution(5, size).double()
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
    x = torch.randn(2, num_tokens, 5, dtype=torch.float64, generator=generator)
    tail = torch.randn(2, size - 1, 5, dtype=torch.float64, generator=generator)
    joined = torch.cat((tail, x), 1)
    windows = joined.unfold(1, size, 1)
    right = F.silu((windows * conv.weight[:, 0]).sum(-1))
    y, new_tail = conv(x, tail, None)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    assert torch.equal(new_tail, joined[:, num_tokens:])
