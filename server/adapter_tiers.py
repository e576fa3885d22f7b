"""Tiers of memory for adapters: a bounded amount on one device, the least recently used out first.

A GPU has two, its own memory and the host's. A CPU has one, "host", because both would be the same
memory; with idle states in int8 it has two again, of which "device" holds what is in use. An
adapter is in one tier at a time. Limit: knows neither files nor who uses what; a tier with more
pinned adapters than it has room for is over its bound until they are released.
"""

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

import torch

from imprint.adapters.adapter import Adapter
from imprint.server.idle_states import PackedAdapter

IdleStates = Literal["exact", "int8"]


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter as a tier has it: whole, packed, or whole with what it was unpacked from.

    The last spares packing it again, which would round once more.
    """

    whole: Adapter | None
    packed: PackedAdapter | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(form.nbytes for form in (self.whole, self.packed) if form is not None)


@dataclass(slots=True)
class Tier:
    """Adapters on one device, by id, the least recently used first."""

    name: str
    device: torch.device
    capacity_bytes: int
    idle_states: IdleStates = "exact"
    num_bytes: int = 0
    _held: OrderedDict[str, Held] = field(default_factory=OrderedDict)

    def __contains__(self, adapter_id: object) -> bool:
        return adapter_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    def put(self, adapter_id: str, held: Held) -> None:
        """Keep an adapter in this tier's form, as the one used last."""
        self.take(adapter_id)
        held = self._formed(held)
        self._held[adapter_id] = held
        self.num_bytes += held.nbytes

    def take(self, adapter_id: str) -> Held | None:
        """Give an adapter away, if it is here."""
        held = self._held.pop(adapter_id, None)
        if held is not None:
            self.num_bytes -= held.nbytes
        return held

    def use(self, adapter_id: str) -> Adapter | None:
        """An adapter, which becomes the one used last; None where it is not here, or packed."""
        held = self._held.get(adapter_id)
        if held is None or held.whole is None:
            return None
        self._held.move_to_end(adapter_id)
        return held.whole

    def surplus(self, pinned: Container[str]) -> str | None:
        """Which adapter has to leave: the least recently used that is not pinned, if any has to."""
        if self.num_bytes <= self.capacity_bytes:
            return None
        return next((id for id in self._held if id not in pinned), None)

    def _formed(self, held: Held) -> Held:
        if self.idle_states == "int8":
            if held.packed is None:
                assert held.whole is not None
                return Held(None, PackedAdapter.of(held.whole))
            return Held(None, held.packed)
        if held.whole is None:
            assert held.packed is not None
            return Held(held.packed.to(self.device), held.packed)
        return Held(held.whole.to(self.device), held.packed)


def tiers_of(
    device: torch.device, *, device_bytes: int, host_bytes: int, idle_states: IdleStates
) -> list[Tier]:
    """The tiers of a worker, that of its model's device first."""
    host = Tier("host", torch.device("cpu"), host_bytes, idle_states)
    if device.type == "cpu" and idle_states == "exact":
        return [host]
    # on a CPU this tier is there for what is in use, and for nothing else
    return [Tier("device", device, device_bytes if device.type != "cpu" else 0), host]
