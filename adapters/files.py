"""A folder of files by id, each written atomically. Knows bytes and names; knows no tensors.

Limit: a file is replaced whole. Loads no torch, so that the API process can delete what workers
have written.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import time
from pathlib import Path

from imprint.adapters import faults

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
SUFFIX = ".safetensors"
STALE_AFTER_S = 3600.0
"""What a process of another machine writes has been torn when it has not grown for so long."""


def partial_suffix(machine: str | None = None, process: int | None = None) -> str:
    """How the name of a file ends that a process is writing: this one of this machine."""
    machine = re.sub(r"[^A-Za-z0-9_-]", "-", platform.node() if machine is None else machine)
    return f".{machine}-{os.getpid() if process is None else process}.partial"


def _being_written(partial: Path, *, elsewhere: bool) -> bool:
    """Whether another live process, such as a second worker, may be writing this file now;
    `elsewhere`, on another machine too."""
    process = partial.name.split(".")[-2].rpartition("-")[-1]
    if not process.isdigit() or partial.name.endswith(partial_suffix()):
        return False
    if not partial.name.endswith(partial_suffix(process=int(process))):
        if not elsewhere:
            return False
        try:
            return time.time() - partial.stat().st_mtime < STALE_AFTER_S
        except FileNotFoundError:
            return False
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


class StoreGoneError(OSError):
    """The folder is not there: unmounted, say. What it holds is unknown until it is back."""

    def __init__(self, root: Path) -> None:
        super().__init__(errno.ENOENT, "the store's folder is not there", str(root))


class FileFolder:
    """One file per id. Made once, when this begins: a folder that goes away is never made anew,
    for what was in it may come back."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        for torn in self.root.glob("*.partial"):
            if not _being_written(torn, elsewhere=True):
                torn.unlink(missing_ok=True)

    def path(self, id: str) -> Path:
        """Where the file lies. Raises ValueError for an id that is no plain name."""
        if not _ID.fullmatch(id):
            raise ValueError(f"adapter id {id!r} must be letters, digits, '_' and '-'")
        return self.root / f"{id}{SUFFIX}"

    def refuse_a_lost_folder(self) -> None:
        """Raises StoreGoneError where the folder has gone away."""
        if not self.root.is_dir():
            raise StoreGoneError(self.root)

    def write(self, id: str, blob: bytes, *, durable: bool) -> None:
        """A crash of this process leaves the old file or the new; `durable`, a power cut too.

        Raises OSError where the disk does not take it; the old file is still there then.
        """
        path = self.path(id)
        self.refuse_a_lost_folder()
        partial = path.with_suffix(partial_suffix())
        half = len(blob) // 2
        try:
            with partial.open("wb") as file:
                file.write(memoryview(blob)[:half])
                faults.at("artefact_write")
                file.write(memoryview(blob)[half:])
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            faults.at("artefact_rename")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if durable:
            self.sync()

    def delete(self, id: str) -> bool:
        """Remove; returns whether it was there. The removal is durable when this returns.

        What a process has left that died while it wrote goes, too, and what one of another machine
        writes: it is told to delete as well. Raises StoreGoneError where nobody can know.
        """
        path = self.path(id)
        for torn in self.root.glob(f"{id}.*.partial"):
            if not _being_written(torn, elsewhere=False):
                torn.unlink(missing_ok=True)
        try:
            path.unlink()
        except FileNotFoundError:
            self.refuse_a_lost_folder()
            return False
        self.sync()
        return True

    def ids(self) -> list[str]:
        """Ids of all files, sorted."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))

    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.root.glob(f"*{SUFFIX}"))

    def sync(self) -> None:
        """Make names that were written or removed durable."""
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class ProgressFolder:
    """What is kept of adaptations until they end: a study's checkpoint, two files an id, see
    `progress.py`; or the file that one was imported from."""

    def __init__(self, store: Path | str) -> None:
        root = Path(store) / "progress"
        self.begun = FileFolder(root / "begun")
        self.steps = FileFolder(root / "steps")
        self.imports = FileFolder(root / "imports")

    @property
    def free_bytes(self) -> int:
        """What the disk would still take; 0 where the folder has gone away."""
        try:
            found = os.statvfs(self.steps.root)
        except FileNotFoundError:
            return 0
        return found.f_bavail * found.f_frsize

    def restart(self, id: str) -> None:
        """Remove the checkpoint; the later file first: without the other it is worth nothing."""
        self.steps.delete(id)
        self.begun.delete(id)

    def delete(self, id: str) -> None:
        """Remove all that is kept of it."""
        self.restart(id)
        self.imports.delete(id)

    def ids(self) -> list[str]:
        """Ids of which there is any file, sorted."""
        return sorted({*self.begun.ids(), *self.steps.ids(), *self.imports.ids()})
