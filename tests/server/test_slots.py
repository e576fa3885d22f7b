"""Slots are exclusive, handles die with `free`, and a slot is zeroed when it changes hands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imprint.models import RecurrentState, load_model
from imprint.server.slot_states import SlotStates
from imprint.server.slots import NULL_SLOT, SlotHandle, SlotTable, StaleSlotError


@given(st.integers(1, 6), st.lists(st.one_of(st.none(), st.integers(0, 20)), max_size=60))
def test_slots_are_exclusive_and_stale_handles_are_refused(
    num_slots: int, actions: list[int | None]
) -> None:
    table = SlotTable(num_slots)
    live: list[SlotHandle] = []
    dead: list[SlotHandle] = []
    for action in actions:
        if action is None:
            handle = table.allocate()
            assert (handle is None) == (len(live) == num_slots)
            if handle is not None:
                live.append(handle)
        elif live:
            handle = live.pop(action % len(live))
            table.free(handle)
            dead.append(handle)
        indexes = [table.index(handle) for handle in live]
        assert len(set(indexes)) == len(indexes) == table.num_used
        assert NULL_SLOT not in indexes
        assert table.num_used + table.num_free == num_slots
        for handle in dead:
            with pytest.raises(StaleSlotError):
                table.index(handle)
            with pytest.raises(StaleSlotError):
                table.free(handle)


def test_a_table_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SlotTable(0)


def test_a_slot_is_zero_when_it_is_allocated_and_when_it_is_freed(tiny_checkpoint: Path) -> None:
    slots = SlotStates(load_model(tiny_checkpoint), 2)
    secret = slots.read([])  # no rows
    assert secret.batch_size == 0
    first = slots.allocate(None)
    assert first is not None
    marked = slots.read([first])
    for tensor in marked.tensors():
        tensor.fill_(7.0)
    slots.write([first], marked)
    assert all(bool((tensor == 7).all()) for tensor in slots.read([first]).tensors())
    everything = slots._states
    assert all(bool((tensor[NULL_SLOT] == 0).all()) for tensor in everything.tensors())
    slots.free(first)
    assert all(not tensor.any() for tensor in everything.tensors())
    second = slots.allocate(None)
    assert second is not None
    assert second.index == first.index
    assert all(not tensor.any() for tensor in slots.read([second]).tensors())
    with pytest.raises(StaleSlotError):
        slots.read([first])
    with pytest.raises(StaleSlotError):
        slots.write([first], marked)


def test_a_copy_that_breaks_off_costs_no_slot(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_checkpoint)
    slots = SlotStates(model, 1)
    state = model.init_state(1)
    for tensor in state.tensors():
        tensor.fill_(1)
    write = RecurrentState.write_

    def break_off(self: RecurrentState, rows: Sequence[int], other: RecurrentState) -> None:
        write(self, rows, other)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RecurrentState, "write_", break_off)
    with pytest.raises(RuntimeError, match="out of memory"):
        slots.allocate(state)
    monkeypatch.undo()
    assert slots.table.num_free == 1
    handle = slots.allocate(None)
    assert handle is not None
    assert all(tensor.abs().max() == 0 for tensor in slots.read([handle]).tensors())


def test_an_initial_state_is_copied(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    slots = SlotStates(model, 3)
    initial = model.init_state(1)
    for tensor in initial.tensors():
        tensor.uniform_(generator=torch.Generator().manual_seed(1))
    handles = [slots.allocate(initial), slots.allocate(initial)]
    assert None not in handles
    a, b = (handle for handle in handles if handle is not None)
    changed = slots.read([a])
    for tensor in changed.tensors():
        tensor.add_(1)
    slots.write([a], changed)
    pairs = zip(slots.read([b]).tensors(), initial.tensors(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
