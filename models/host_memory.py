"""Keeps the allocator from giving memory back that the next call asks for again.

As it comes, glibc maps large pieces one by one, and returns the top of its heap whenever a call's
temporaries are freed; the next call has every page faulted in and zeroed anew. Limit: glibc's
malloc only, elsewhere nothing happens; tensors of a GPU have an allocator of their own.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

KEPT_BYTES: Final = 2**30
"""Freed memory at the heap's top that a process keeps: more than a batch of eight studies needs."""
OWN_SETTINGS: Final = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "GLIBC_TUNABLES",
)
"""Variables by which an operator tells malloc what to do: then nothing is changed."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Make this process keep what it frees, up to `KEPT_BYTES`; returns whether it does so.

    What it holds at its busiest stays the same; what it holds afterwards, until
    `give_freed_memory_back`, is about as much.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name in os.environ for name in OWN_SETTINGS):
        return False
    # no piece is mapped by itself: the threshold for this can be raised to 32 MiB only, and the
    # states of a batch of rollouts are larger
    unmapped = libc.mallopt(_M_MMAP_MAX, 0)
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and unmapped)


def give_freed_memory_back() -> None:
    """Return all freed pages to the kernel, also those between pieces that are in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
