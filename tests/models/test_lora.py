"""Deltas: many in one call equal each alone, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.deltanet import DeltaNet
from imprint.models.lora import DeltaLinear, LoraDelta
from imprint.models.registry import build_model

DOCUMENT = torch.randint(257, (6, 21), generator=torch.Generator().manual_seed(0))


def random_delta(model: FastWeightModel, num: int, seed: int = 0, rank: int = 3) -> LoraDelta:
    delta = LoraDelta.init(model.lora_targets(), rank, seed=seed, num=num, dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed + 100)
    for tensor in delta.parameters():
        tensor.normal_(0, 0.2, generator=generator)
    return delta


def loss_of(model: FastWeightModel, document: Tensor, delta: LoraDelta | None) -> Tensor:
    hidden, state = model(document, delta=delta)
    return model.logits(hidden)[..., 5].cos().sum() + sum(t.square().sum() for t in state.tensors())


def test_fresh_delta_is_nothing(any_model64: FastWeightModel) -> None:
    delta = LoraDelta.init(any_model64.lora_targets(), 4, seed=1, num=2, dtype=torch.float64)
    with torch.no_grad():
        base, _ = any_model64(DOCUMENT)
        with_delta, _ = any_model64(DOCUMENT, delta=delta)
    assert torch.equal(base, with_delta)
    for name, a in delta.a.items():
        bound = (3 / a.shape[-1]) ** 0.5
        assert torch.equal(a[0], a[1]), name
        assert 0.5 * bound < float(a.abs().max()) <= bound, name
    assert (delta.num, delta.rank) == (2, 4)


def test_same_seed_same_draw() -> None:
    targets = {"x": (5, 7)}
    first = LoraDelta.init(targets, 2, seed=3)
    assert torch.equal(first.a["x"], LoraDelta.init(targets, 2, seed=3, num=2).a["x"][1:])
    assert not torch.equal(first.a["x"], LoraDelta.init(targets, 2, seed=4).a["x"])
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoraDelta.init(targets, 0, seed=0)


def test_delta_equals_folded_weights(any_model64: FastWeightModel) -> None:
    delta = random_delta(any_model64, 1)
    folded = build_model(any_model64.config).double()
    folded.load_state_dict(any_model64.state_dict())
    with torch.no_grad():
        for linear in folded.modules():
            if isinstance(linear, DeltaLinear):
                names = linear.targets()
                for name, weight in zip(names, linear.weight.chunk(len(names)), strict=True):
                    weight += delta.b[name][0] @ delta.a[name][0]
        right, right_state = folded(DOCUMENT)
        got, state = any_model64(DOCUMENT, delta=delta)
        base, _ = any_model64(DOCUMENT)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    for a, b in zip(state.tensors(), right_state.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert float((got - base).abs().max()) > 0.1


@pytest.mark.parametrize(("num", "ragged"), [(6, False), (3, False), (2, True)])
def test_many_deltas_in_one_call_equal_separate_calls(
    any_model64: FastWeightModel, num: int, ragged: bool
) -> None:
    delta = random_delta(any_model64, num)
    group = len(DOCUMENT) // num
    lengths = torch.tensor([21, 3, 1, 8, 21, 13]) if ragged else None
    with torch.no_grad():
        hidden, state = any_model64(DOCUMENT, delta=delta, lengths_B=lengths)
        for i in range(num):
            rows = slice(i * group, (i + 1) * group)
            own = delta.slice(i, i + 1)
            own_lengths = None if lengths is None else lengths[rows]
            right, right_state = any_model64(DOCUMENT[rows], delta=own, lengths_B=own_lengths)
            for row in range(group):
                n = 21 if own_lengths is None else int(own_lengths[row])
                torch.testing.assert_close(
                    hidden[rows][row, :n], right[row, :n], rtol=1e-10, atol=1e-10
                )
            own_state = state.slice(rows.start, rows.stop)
            for a, b in zip(own_state.tensors(), right_state.tensors(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num", [6, 2])
def test_gradients_of_many_deltas_equal_separate_ones(
    any_model64: FastWeightModel, num: int
) -> None:
    delta = random_delta(any_model64, num).requires_grad_()
    loss_of(any_model64, DOCUMENT, delta).backward()
    group = len(DOCUMENT) // num
    for i in range(num):
        own = delta.detach().slice(i, i + 1).clone().requires_grad_()
        loss_of(any_model64, DOCUMENT[i * group : (i + 1) * group], own).backward()
        for shared, single in zip(delta.parameters(), own.parameters(), strict=True):
            scale = float(single.grad.norm())
            assert scale > 0
            assert float((shared.grad[i] - single.grad[0]).norm()) < 1e-9 * scale


def test_gradients_never_mix(any_model64: FastWeightModel) -> None:
    delta = random_delta(any_model64, 3).requires_grad_()
    hidden, state = any_model64(DOCUMENT, delta=delta)
    own = sum(t.square().sum() for t in state.slice(2, 4).tensors())
    (any_model64.logits(hidden)[2:4].cos().sum() + own).backward()
    for parameter in delta.parameters():
        assert parameter.grad[1].any()
        assert not parameter.grad[0].any()
        assert not parameter.grad[2].any()


def test_a_broken_delta_does_not_touch_its_neighbours(any_model64: FastWeightModel) -> None:
    delta = random_delta(any_model64, 2)
    broken = delta.clone()
    for tensor in broken.parameters():
        tensor[1] = float("nan")
    with torch.no_grad():
        right, _ = any_model64(DOCUMENT, delta=delta)
        got, _ = any_model64(DOCUMENT, delta=broken)
    assert torch.equal(got[:3], right[:3])
    assert not got[3:].isfinite().any()


def test_base_weights_get_no_gradient(any_model64: FastWeightModel) -> None:
    delta = random_delta(any_model64, 1).requires_grad_()
    loss_of(any_model64, DOCUMENT, delta).backward()
    assert all(parameter.grad is None for parameter in any_model64.parameters())


def test_batch_that_no_group_fits_is_refused(any_model64: FastWeightModel) -> None:
    with pytest.raises(ValueError, match="4 deltas cannot serve a batch of 6 rows"):
        any_model64(DOCUMENT, delta=random_delta(any_model64, 4))


def test_scaled_blends_linearly(any_model64: FastWeightModel) -> None:
    delta = random_delta(any_model64, 1)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    name = "layers.0.attn.q_proj"
    full, half = delta.apply(name, x), delta.scaled(0.5).apply(name, x)
    torch.testing.assert_close(half, full / 2, rtol=1e-12, atol=0)
    assert not delta.scaled(0.0).apply(name, x).any()


def test_only_targets_are_changed(any_model64: FastWeightModel) -> None:
    name = "layers.1.attn.o_proj"
    delta = LoraDelta.init({name: (32, 32)}, 2, seed=0, dtype=torch.float64)
    delta.b[name].fill_(0.3)
    assert delta.apply("layers.0.attn.o_proj", DOCUMENT.double()) is None
    with torch.no_grad():
        _, base = any_model64(DOCUMENT)
        hidden, state = any_model64(DOCUMENT, delta=delta)
        right, _ = any_model64(DOCUMENT)
    for name, tensor in state.layers[0].items():
        assert torch.equal(tensor, base.layers[0][name])
    assert not torch.equal(hidden, right)


def test_stack_slice_clone_detach() -> None:
    targets = {"x": (5, 7), "y": (2, 3)}
    first = LoraDelta.init(targets, 2, seed=1)
    second = LoraDelta.init(targets, 2, seed=2, num=2)
    both = LoraDelta.stack([first, second])
    assert both.num == 3
    assert torch.equal(both.slice(0, 1).a["y"], first.a["y"])
    assert torch.equal(both.slice(1, 3).a["x"], second.a["x"])
    copy = both.clone()
    copy.a["x"].zero_()
    assert both.a["x"].any()
    assert both.nbytes == 3 * 2 * (5 + 7 + 2 + 3) * 4
    both.requires_grad_()
    assert all(t.requires_grad for t in both.parameters())
    assert not any(t.requires_grad for t in both.detach().parameters())
    assert not any(t.requires_grad for t in both.requires_grad_(False).parameters())


def test_tensors_round_trip(any_model64: FastWeightModel) -> None:
    delta = random_delta(any_model64, 2)
    tensors = {**delta.to_tensors(), "state.0.S": torch.ones(1)}
    assert "delta.a.layers.0.attn.q_proj" in tensors
    back = LoraDelta.from_tensors(tensors)
    assert list(back.a) == list(delta.a)
    for got, right in zip(back.parameters(), delta.parameters(), strict=True):
        assert torch.equal(got, right)


def test_side_path_is_float32_under_bfloat16(tiny_model: DeltaNet) -> None:
    model = DeltaNet(tiny_model.config).to(torch.bfloat16)
    model.load_state_dict(tiny_model.state_dict())
    delta = LoraDelta.init(model.lora_targets(), 2, seed=0).requires_grad_()
    hidden, _ = model(DOCUMENT, delta=delta)
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in delta.parameters())
    side = delta.apply("layers.0.attn.q_proj", torch.ones(1, 1, 32, dtype=torch.bfloat16))
    assert side is not None
    assert side.dtype == torch.float32


def test_padded_deltas_act_each_as_alone(any_model64: FastWeightModel) -> None:
    targets = any_model64.lora_targets()
    some = {name: widths for i, (name, widths) in enumerate(targets.items()) if i % 2}
    deltas = [
        LoraDelta.init(targets, 3, seed=1, dtype=torch.float64),
        None,
        LoraDelta.init(some, 5, seed=2, dtype=torch.float64),
    ]
    for delta in deltas:
        for tensor in delta.b.values() if delta is not None else ():
            tensor.normal_()
    padded = LoraDelta.padded(deltas)
    assert padded is not None
    assert (padded.num, padded.rank, set(padded.a)) == (3, 5, set(targets))
    for name, (width_in, width_out) in targets.items():
        x_BTI = torch.randn(3, 4, width_in, dtype=torch.float64)
        got = padded.apply(name, x_BTI)
        assert got is not None
        for i, delta in enumerate(deltas):
            own = delta.apply(name, x_BTI[i : i + 1]) if delta is not None else None
            expected = torch.zeros(1, 4, width_out, dtype=torch.float64) if own is None else own
            torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-12, atol=1e-12)
    assert LoraDelta.padded([None, None]) is None


def test_joined_deltas_act_as_their_sum(any_model64: FastWeightModel) -> None:
    targets = any_model64.lora_targets()
    some = {name: shape for name, shape in targets.items() if name.endswith("q_proj")}
    first, second = (
        LoraDelta.init(t, rank, seed=rank, num=2, dtype=torch.float64)
        for t, rank in ((some, 3), (targets, 2))
    )
    for delta in (first, second):
        for b_QOR in delta.b.values():
            b_QOR.normal_(generator=torch.Generator().manual_seed(delta.rank))
    joined = first.joined(second)
    assert (joined.rank, joined.num, set(joined.a)) == (5, 2, set(targets))
    for name, (width_in, _) in targets.items():
        x_BTI = torch.randn(4, 3, width_in, dtype=torch.float64)
        parts = [delta.apply(name, x_BTI) for delta in (first, second)]
        expected = sum(part for part in parts if part is not None)
        torch.testing.assert_close(joined.apply(name, x_BTI), expected, rtol=1e-12, atol=1e-12)
