"""How much memory a worker process uses, of the host and of its GPU, and how much there is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil
import torch

_CGROUP_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),  # version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
)


def resident_bytes() -> int:
    """Resident memory of this process."""
    resident: int = psutil.Process().memory_info().rss
    return resident


def host_bytes(limits: Iterable[Path] = _CGROUP_LIMITS) -> int:
    """The machine's memory, or less where a container may use less.

    `limits`: files that may hold a number of bytes; what is absent or says `max` limits nothing.
    """
    total: int = psutil.virtual_memory().total
    return min([total, *(limit for path in limits if (limit := _limit(path)))])


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def free_bytes(device: torch.device) -> int | None:
    """What a CUDA device has left for this process, its allocator's empty blocks included."""
    sizes = device_bytes(device)
    return sizes["free"] + sizes["reserved"] - sizes["allocated"] if sizes else None


def device_bytes(device: torch.device) -> dict[str, int]:
    """Of a CUDA device: allocated and reserved by this process, free and in all; else nothing."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "free": free,
        "total": total,
    }
