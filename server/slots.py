"""Who owns which slot: integer handles with generation numbers.

Knows no tensors (`slot_states.py` keeps those) and no requests. Slot 0 is the null slot: padding
may point at it, nobody owns it. A handle dies with `free`; using it afterwards raises, because a
stale handle would read another document's memory.
"""

from dataclasses import dataclass

NULL_SLOT = 0


class StaleSlotError(RuntimeError):
    """A handle was used after its slot had been freed: a bug of ours, stopped before it leaks."""


@dataclass(frozen=True, slots=True)
class SlotHandle:
    """The right to use slot `index` for as long as its generation lasts."""

    index: int
    generation: int


class SlotTable:
    """Allocation of slots 1 ... num_slots, the last one freed first."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        self._generations = [0] * (num_slots + 1)
        self._used = [False] * (num_slots + 1)
        self._free = list(range(num_slots, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used) - 1 - len(self._free)

    def allocate(self) -> SlotHandle | None:
        """A fresh handle, or None when every slot is in use."""
        if not self._free:
            return None
        index = self._free.pop()
        self._used[index] = True
        return SlotHandle(index, self._generations[index])

    def index(self, handle: SlotHandle) -> int:
        """The slot of a live handle; raises `StaleSlotError` for any other."""
        if not self._used[handle.index] or self._generations[handle.index] != handle.generation:
            raise StaleSlotError(
                f"slot {handle.index} is in generation {self._generations[handle.index]}, "
                f"the handle is of generation {handle.generation}"
            )
        return handle.index

    def free(self, handle: SlotHandle) -> None:
        """Give a slot back; every copy of the handle is stale from here on."""
        index = self.index(handle)
        self._generations[index] += 1
        self._used[index] = False
        self._free.append(index)
