"""The tensors behind the slots: one recurrent state per slot, zeroed whenever its owner changes.

Knows nothing of requests. All sequences that decode read and write here, and only through live
handles, so what one document left behind is never visible to the next.
"""

from collections.abc import Sequence

from imprint.models import FastWeightModel, RecurrentState
from imprint.server.slots import SlotHandle, SlotTable


class SlotStates:
    """`num_slots` recurrent states and the null slot, allocated once."""

    def __init__(self, model: FastWeightModel, num_slots: int) -> None:
        self.table = SlotTable(num_slots)
        self._states = model.init_state(num_slots + 1)

    @property
    def nbytes(self) -> int:
        return self._states.nbytes

    @property
    def pool(self) -> RecurrentState:
        """All slots, the null slot first: for decoding in place on the rows of live handles."""
        return self._states

    def rows(self, handles: Sequence[SlotHandle]) -> list[int]:
        """The rows of the pool that are the slots of these handles."""
        return [self.table.index(handle) for handle in handles]

    def allocate(self, initial: RecurrentState | None) -> SlotHandle | None:
        """A zeroed slot holding a copy of `initial` (None: a document's start), or None if full."""
        handle = self.table.allocate()
        if handle is not None:
            try:
                self.reset(handle, initial)
            except BaseException:
                self.table.free(handle)  # zeroed by whoever takes it next
                raise
        return handle

    def reset(self, handle: SlotHandle, initial: RecurrentState | None) -> None:
        """Make a slot what `allocate` made it."""
        rows = self.rows([handle])
        self._states.zero_(rows)
        if initial is not None:
            self._states.write_(rows, initial)

    def read(self, handles: Sequence[SlotHandle]) -> RecurrentState:
        """A batch with a copy of each slot, in order."""
        return self._states.select(self.rows(handles))

    def write(self, handles: Sequence[SlotHandle], states: RecurrentState) -> None:
        """Put row i of `states` into slot i."""
        self._states.write_(self.rows(handles), states)

    def free(self, handle: SlotHandle) -> None:
        """Zero a slot and give it back."""
        self._states.zero_([self.table.index(handle)])
        self.table.free(handle)
