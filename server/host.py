"""What the machine still has: memory, and space under the data folder. No torch."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

# The limits of a container's memory, in version 2 and 1 of Linux's control groups.
LIMIT_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Bytes, as of now."""

    memory_limit: int
    """The container's limit, or the machine's memory where there is none."""
    filesystem_size: int
    filesystem_available: int
    """Both 0 while the data folder is gone."""


def look_around(data_dir: Path, limit_files: tuple[Path, ...] = LIMIT_FILES) -> Host:
    """What the server may use, of memory and of the file system that holds its data."""
    try:
        usage = shutil.disk_usage(data_dir)
        size, available = usage.total, usage.free
    except OSError:
        size = available = 0
    return Host(
        memory_limit=memory_limit(limit_files),
        filesystem_size=size,
        filesystem_available=available,
    )


def memory_limit(limit_files: tuple[Path, ...] = LIMIT_FILES) -> int:
    """Bytes after which the kernel ends a process of this group."""
    total: int = psutil.virtual_memory().total
    for path in limit_files:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" where there is no limit
            return min(total, int(text))
    return total
