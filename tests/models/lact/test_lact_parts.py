"""What LaCT is made of: window attention, rotary positions, steps, plans, starts, configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.models.attention import (
    Rotation,
    rotate,
    shared_window_attention,
    window_attention,
)
from imprint.models.checkpoint import load_model, save_model
from imprint.models.errors import CheckpointError
from imprint.models.kernels.lact import (
    FastWeights,
    orthogonalize,
    read_fast_weights,
    step_fast_weights,
)
from imprint.models.lact import LaCT
from imprint.models.lact_chunks import join_rounds, plan_rounds
from imprint.models.lact_config import LactConfig
from imprint.models.registry import load_config


def randn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def attend_row(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One head of one row, token by token; the last queries are those of the last keys."""
    outs = []
    for t in range(q.shape[0]):
        last = k.shape[0] - q.shape[0] + t + 1
        seen = slice(max(last - window, 0), last)
        outs.append((k[seen] @ q[t] * q.shape[1] ** -0.5).softmax(0) @ v[seen])
    return torch.stack(outs)


@pytest.mark.parametrize("window", [1, 2, 7, 70, 600])
@pytest.mark.parametrize("num_tokens", [1, 2, 65, 130])
@pytest.mark.parametrize("shared", [False, True])
def test_window_attention(window: int, num_tokens: int, shared: bool) -> None:
    keep, batch = window - 1, 4
    before_rows = 2 if shared else batch
    nums = [0, keep, keep // 2, max(keep - 1, 0)][:before_rows]
    q, k, v = (randn(batch, 2, num_tokens, 8, seed=i) for i in range(3))
    before = [randn(before_rows, 2, keep, 8, seed=i) for i in (3, 4)]
    for row, num in enumerate(nums):
        for tensor in before:
            tensor[row, :, : keep - num] = 1e6  # must not be looked at
    if shared:
        out = shared_window_attention(q, (before[0], before[1]), (k, v), nums)
    else:
        keys, values = (torch.cat(x, 2) for x in zip(before, (k, v), strict=True))
        out = window_attention(q, keys, values, window, nums)
    for row in range(batch):
        home = row // (batch // before_rows)
        start = keep - nums[home]
        for head in range(2):
            keys, values = (
                torch.cat((old[home, head, start:], new[row, head]))
                for old, new in zip(before, (k, v), strict=True)
            )
            right = attend_row(q[row, head], keys, values, window)
            torch.testing.assert_close(out[row, head], right, rtol=1e-10, atol=1e-12)


def test_rotation_goes_back_and_keeps_products_of_equal_distance() -> None:
    x, y = randn(1, 3, 2, 8), randn(1, 3, 2, 8, seed=1)
    rotation = Rotation.of(torch.tensor([[0, 5, 900]]), 8, 1e4, torch.float64)
    turned = rotate(x, rotation)
    torch.testing.assert_close(rotate(turned, rotation.back()), x, rtol=0, atol=1e-12)
    assert torch.equal(turned[:, 0], x[:, 0])
    later = Rotation.of(torch.tensor([[7, 12, 907]]), 8, 1e4, torch.float64)
    products = [(rotate(x, r)[0, 0] * rotate(y, r)[0, 1]).sum() for r in (rotation, later)]
    torch.testing.assert_close(products[1], products[0], rtol=1e-10, atol=1e-10)
    assert rotate(x.bfloat16(), Rotation(*(t.float() for t in rotation))).dtype == torch.bfloat16


def fast_weights(rows: int, seed: int) -> FastWeights:
    shapes = ((6, 4), (4, 6), (6, 4))
    return FastWeights(*(randn(rows, 2, *shape, seed=seed + i) for i, shape in enumerate(shapes)))


def test_one_row_of_weights_serves_all() -> None:
    weights, q = fast_weights(2, 0), randn(6, 2, 5, 4)
    forked = FastWeights(*(w.repeat_interleave(3, 0) for w in weights))
    torch.testing.assert_close(read_fast_weights(weights, q), read_fast_weights(forked, q))


@pytest.mark.parametrize("muon_dtype", [None, torch.float64])
def test_gradients_through_a_step(muon_dtype: torch.dtype | None) -> None:
    weights, momentum = fast_weights(2, 0), fast_weights(2, 10)
    k, v, rates = randn(2, 2, 3, 4), randn(2, 2, 3, 4, seed=1), randn(2, 2, 3, 3, seed=2)
    inputs = [*weights, *momentum, k, v, rates.sigmoid(), randn(2, 2, 3, seed=3).sigmoid()]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        new, new_momentum = step_fast_weights(
            FastWeights(*tensors[:3]),
            FastWeights(*tensors[3:6]),
            *tensors[6:],
            weights.row_norms(),
            muon_dtype=muon_dtype,
        )
        assert new_momentum is not None
        return *new, *new_momentum

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(step, leaves, fast_mode=True)
    for new, old in zip(step(*inputs)[:3], weights, strict=True):
        torch.testing.assert_close(new.norm(dim=-1), old.norm(dim=-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 24, 16), (2, 3, 16, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    right = orthogonalize(x, torch.float64)
    values = torch.linalg.svdvals(right)
    assert 0.7 < float(values.min()) < float(values.max()) < 1.3
    rounded = orthogonalize(x.float(), torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert float((rounded - right).norm() / right.norm()) < 0.05


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [([0], [1]), ([7], [1]), ([8], [30]), ([3, 3], [20, 4]), ([0, 5, 7], [17, 0, 9]), ([0], [0])],
)
def test_plans_cover_every_token_once(positions: list[int], lengths: list[int]) -> None:
    rounds = plan_rounds(positions, lengths, 8)
    num_tokens = max(*lengths, 3)
    outs = []
    for i, part in enumerate(rounds):
        assert len(rounds) == 1 or part.first < part.last
        out = torch.full((len(positions), 1, part.last - part.first, 1), 100.0)
        for row, (start, end) in enumerate(zip(part.starts, part.ends, strict=True)):
            assert part.first <= start <= end <= part.last or start == end
            out[row, 0, start - part.first : end - part.first] = i + 1
            crossed = (positions[row] + end) // 8 > (positions[row] + start) // 8
            assert crossed == (row in part.closing)
        outs.append(out)
    joined = join_rounds(outs, rounds, num_tokens)
    assert joined.shape == (len(positions), 1, num_tokens, 1)
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        chunks = [(position + t) // 8 - position // 8 + 1 for t in range(length)]
        assert joined[row, 0, :length, 0].tolist() == chunks


def test_fresh_weights_start_as_the_published_ones() -> None:
    model = LaCT(
        LactConfig(
            vocab_size=31,
            hidden_size=64,
            num_hidden_layers=1,
            num_attn_heads=4,
            num_lact_heads=2,
            w0_w2_low_rank=8,
            qkv_bias=True,
        )
    )
    model.reset_parameters(1)
    model.requires_grad_(False)
    parameters = {n.partition("attn.")[2]: p for n, p in model.named_parameters()}
    for name, scale in {"w1": 32, "w0.w_left": 4 * 8, "w2.w_right": 4 * 32}.items():
        assert float(parameters[name].std()) == pytest.approx(scale**-0.5, rel=0.1)
    assert bool((parameters["qk_scale"] == 1).all())
    for name in ("qk_offset", "lr_proj.bias", "momentum_proj.0.bias", "qkv.bias"):
        assert not parameters[name].any()
    with torch.no_grad():
        _, state = model(torch.arange(10).view(1, 10))
    rates = state.layers[0]["rates"][0, :10, :6]
    assert float(rates.mean()) == pytest.approx(1e-3, rel=0.2)


def test_checkpoints_come_back(build_lact: Callable[..., LaCT], tmp_path: Path) -> None:
    model = build_lact(w0_w2_low_rank=3, use_muon=True, no_v_silu=True)
    save_model(model, tmp_path)
    assert load_config(tmp_path) == model.config
    loaded = load_model(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, LaCT)
    document = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(loaded(document)[0], model(document)[0])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_attn_heads": 25}, "num_attn_heads"),
        ({"num_lact_heads": 7}, "num_lact_heads"),
        ({"num_attn_heads": 512}, "even width"),
        ({"window_size": None}, "window_size"),
        ({"lact_chunk_size": 0}, "lact_chunk_size"),
        ({"inter_multi": 0.0001}, "fast_inner_dim"),
        ({"use_muon": True, "use_fused_kernel": True}, "use_fused_kernel"),
        ({"ttt_prenorm": True}, "ttt_prenorm"),
        ({"lr_dim": 2}, "lr_dim"),
        ({"lr_parameterization": "exp"}, "lr_parameterization"),
        ({"ttt_loss_type": "l2"}, "ttt_loss_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_configs_that_mean_another_computation_are_refused(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    raw = {
        "model_type": "lact_swiglu",
        "hidden_size": 512,
        "num_attn_heads": 8,
        "rope_theta": 1000000,
        "inter_multi": 1,
        "fp32_states": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert isinstance(load_config(tmp_path), LactConfig)
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(CheckpointError, match=word):
        load_config(tmp_path)
