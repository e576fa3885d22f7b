"""Random lives of the slot pool: documents come, write, are read, leave, and die with their slots.

Every owner writes a number of its own. Whatever happened before, an owner reads its own number and
nothing else, a slot that nobody owns holds zeros, and a handle of the past opens nothing.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from imprint.models import RecurrentState
from imprint.models.config import DeltaNetConfig
from imprint.models.deltanet import DeltaNet
from imprint.server.slot_states import SlotStates
from imprint.server.slots import NULL_SLOT, SlotHandle, StaleSlotError

CONFIG = DeltaNetConfig(
    vocab_size=16, hidden_size=8, num_hidden_layers=1, num_heads=1, intermediate_size=8
)
MODEL = DeltaNet(CONFIG)


def filled(number: float) -> RecurrentState:
    """A state that holds `number` everywhere."""
    state = MODEL.init_state(1)
    for tensor in state.tensors():
        tensor.fill_(number)
    return state


def holds(state: RecurrentState, number: float) -> bool:
    return all(bool((tensor == number).all()) for tensor in state.tensors())


class SlotLives(RuleBasedStateMachine):
    """Owners by handle, with the number that each has written last; and the handles of the dead."""

    @initialize(num_slots=st.integers(1, 5))
    def start(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots = SlotStates(MODEL, num_slots)
        self.owned: dict[SlotHandle, float] = {}
        self.dead: list[SlotHandle] = []
        self.number = 0.0

    def _next_number(self) -> float:
        self.number += 1.0
        return self.number

    def _owner(self, choice: int) -> SlotHandle | None:
        handles = list(self.owned)
        return handles[choice % len(handles)] if handles else None

    @rule(from_document=st.booleans())
    def an_owner_arrives(self, from_document: bool) -> None:
        number = self._next_number() if from_document else 0.0
        handle = self.slots.allocate(filled(number) if from_document else None)
        assert (handle is None) == (len(self.owned) == self.num_slots)
        if handle is not None:
            assert handle not in self.owned
            assert handle not in self.dead
            self.owned[handle] = number

    @rule(choice=st.integers(0, 100))
    def an_owner_writes(self, choice: int) -> None:
        if handle := self._owner(choice):
            self.owned[handle] = self._next_number()
            self.slots.write([handle], filled(self.owned[handle]))

    @rule(choice=st.integers(0, 100))
    def an_owner_leaves(self, choice: int) -> None:
        if handle := self._owner(choice):
            self.slots.free(handle)
            del self.owned[handle]
            self.dead.append(handle)

    @rule(choice=st.integers(0, 100), number=st.integers(1, 9))
    def the_dead_knock(self, choice: int, number: int) -> None:
        if self.dead:
            handle = self.dead[choice % len(self.dead)]
            for use in (
                lambda: self.slots.read([handle]),
                lambda: self.slots.write([handle], filled(-number)),
                lambda: self.slots.rows([handle]),
                lambda: self.slots.free(handle),
            ):
                with pytest.raises(StaleSlotError):
                    use()

    @rule()
    def all_owners_are_read_in_one_batch(self) -> None:
        states = self.slots.read(list(self.owned))
        for row, number in enumerate(self.owned.values()):
            assert holds(states.select([row]), number)

    @invariant()
    def nobody_shares_and_what_is_free_is_zero(self) -> None:
        if not hasattr(self, "slots"):
            return
        table = self.slots.table
        rows = self.slots.rows(list(self.owned))
        assert len(set(rows)) == len(rows) == table.num_used
        assert table.num_used + table.num_free == self.num_slots
        for row in range(self.num_slots + 1):
            if row not in rows:
                assert holds(self.slots.pool.select([row]), 0.0)
        assert NULL_SLOT not in rows
        for handle, number in self.owned.items():
            assert holds(self.slots.read([handle]), number)


TestSlotLives = SlotLives.TestCase
TestSlotLives.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_what_is_read_is_a_copy() -> None:
    slots = SlotStates(MODEL, 1)
    handle = slots.allocate(filled(1.0))
    assert handle is not None
    for tensor in slots.read([handle]).tensors():
        tensor.add_(torch.ones(()))
    assert holds(slots.read([handle]), 1.0)
