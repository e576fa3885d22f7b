"""How much memory a worker process uses, of the host and of its GPU."""

import psutil
import torch


def resident_bytes() -> int:
    """Resident memory of this process."""
    resident: int = psutil.Process().memory_info().rss
    return resident


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
