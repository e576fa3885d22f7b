"""RecurrentState: copies, views, slots, files, and gradients through all that copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imprint.models.architecture import FastWeightModel
from imprint.models.deltanet import DeltaNet
from imprint.models.generate import prefill
from imprint.models.state import RecurrentState


def make(batch: int, seed: int = 0) -> RecurrentState:
    generator = torch.Generator().manual_seed(seed)
    return RecurrentState(
        tuple(
            {
                "S": torch.randn(batch, 2, 3, 4, generator=generator, dtype=torch.float64),
                "conv_q": torch.randn(batch, 3, 6, generator=generator, dtype=torch.float64),
            }
            for _ in range(2)
        )
    )


def equal(a: RecurrentState, b: RecurrentState) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_sizes_and_order() -> None:
    state = make(5)
    assert state.batch_size == 5
    assert state.nbytes == 2 * 5 * (2 * 3 * 4 + 3 * 6) * 8
    first = state.layers[0]
    assert [t.data_ptr() for t in state.tensors()[:2]] == [
        first["S"].data_ptr(),
        first["conv_q"].data_ptr(),
    ]


def test_fork_repeats_each_row_and_copies() -> None:
    state = make(2)
    forked = state.fork(3)
    assert forked.batch_size == 6
    for row in range(6):
        assert equal(forked.slice(row, row + 1), state.slice(row // 3, row // 3 + 1))
    before = state.clone()
    forked.zero_()
    assert equal(state, before)
    state.fork().zero_()
    assert equal(state, before)


def test_stack_slice_select() -> None:
    first, second = make(2, 1), make(3, 2)
    both = RecurrentState.stack([first, second])
    assert both.batch_size == 5
    assert equal(both.slice(0, 2), first)
    assert equal(both.slice(2, 5), second)
    picked = both.select([4, 0, 0])
    assert equal(picked.slice(0, 1), second.slice(2, 3))
    assert equal(picked.slice(2, 3), first.slice(0, 1))
    assert equal(both.select(torch.tensor([1])), first.slice(1, 2))


def test_slice_is_a_view_and_select_is_not() -> None:
    state = make(3)
    assert state.slice(1, 2).tensors()[0].data_ptr() == state.tensors()[0][1].data_ptr()
    before = state.clone()
    state.select([1]).zero_()
    assert equal(state, before)


@pytest.mark.parametrize(
    ("operation", "share"),
    [
        (lambda s: s.fork(3), [3, 3, 3]),
        (lambda s: RecurrentState.stack([s, s]), [2, 2, 2]),
        (lambda s: s.select([2, 0, 2]), [1, 0, 2]),
        (lambda s: s.slice(1, 3), [0, 1, 1]),
        (lambda s: s.clone(), [1, 1, 1]),
    ],
)
def test_gradients_flow_through(operation, share: list[int]) -> None:
    leaf = make(3).leaf()
    sum(t.sum() for t in operation(leaf).tensors()).backward()
    for grad in leaf.grads():
        assert grad is not None
        rows = torch.tensor(share, dtype=grad.dtype).view(-1, *[1] * (grad.dim() - 1))
        assert torch.equal(grad, rows.expand_as(grad))


def test_leaf_is_a_fresh_copy_and_detach_cuts() -> None:
    state = make(1)
    leaf = state.leaf()
    assert all(t.requires_grad and t.is_leaf for t in leaf.tensors())
    assert not any(t.requires_grad for t in state.tensors())
    assert leaf.tensors()[0].data_ptr() != state.tensors()[0].data_ptr()
    assert leaf.grads() == [None] * 4
    assert not any(t.requires_grad for t in leaf.fork(2).detach().tensors())


def test_zero_sets_all_rows_or_the_given_ones() -> None:
    state = make(3)
    before = state.clone()
    state.zero_([1])
    assert not any(t[1].any() for t in state.tensors())
    assert equal(state.select([0, 2]), before.select([0, 2]))
    state.zero_()
    assert not any(t.any() for t in state.tensors())


def test_write_overwrites_the_given_rows_only() -> None:
    slots, other = make(4, 1), make(2, 2)
    before = slots.clone()
    slots.write_([3, 0], other)
    assert equal(slots.slice(3, 4), other.slice(0, 1))
    assert equal(slots.slice(0, 1), other.slice(1, 2))
    assert equal(slots.slice(1, 3), before.slice(1, 3))


def test_save_and_load_are_bit_for_bit(tmp_path: Path, tiny_model: DeltaNet) -> None:
    with torch.no_grad():
        _, state = tiny_model(torch.arange(40).view(2, 20))
    state.save(tmp_path / "state.safetensors")
    loaded = RecurrentState.load(tmp_path / "state.safetensors")
    assert equal(loaded, state)
    assert [set(layer) for layer in loaded.layers] == [set(layer) for layer in state.layers]


def test_views_can_be_saved(tmp_path: Path) -> None:
    state = make(3)
    state.slice(1, 2).save(tmp_path / "row.safetensors")
    assert equal(RecurrentState.load(tmp_path / "row.safetensors"), state.slice(1, 2))


def test_foreign_tensors_are_passed_over() -> None:
    state = make(1)
    tensors = {**state.to_tensors(), "delta.a.x": torch.ones(1)}
    assert equal(RecurrentState.from_tensors(tensors), state)


def test_more_than_ten_layers_keep_their_order() -> None:
    state = RecurrentState(tuple({"S": torch.full((1,), float(i))} for i in range(12)))
    assert equal(RecurrentState.from_tensors(state.to_tensors()), state)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 70), (2, 70), (2, 48), (3, 5)])
def test_a_reading_leaves_its_state_and_nothing_else(
    any_model64: FastWeightModel, rows: int, tokens: int
) -> None:
    """A view would keep memory that grows with what was read, and kernels take no gaps."""
    _, state = prefill(any_model64, torch.arange(rows * tokens).view(rows, tokens) % 257)
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.tensors()) == state.nbytes
    assert all(tensor.is_contiguous() for tensor in state.tensors())


def test_counters_in_a_state_get_no_gradient() -> None:
    layer = {"S": torch.ones(2, 3), "position": torch.tensor([4, 5])}
    leaf = RecurrentState((layer,)).leaf()
    (leaf.layers[0]["S"] * leaf.layers[0]["position"].unsqueeze(1)).sum().backward()
    weights_grad, counter_grad = leaf.grads()
    assert weights_grad is not None
    assert torch.equal(weights_grad, torch.tensor([[4.0] * 3, [5.0] * 3]))
    assert counter_grad is None
