"""Adapters on disk: one verified file each, written atomically. Knows nothing of memory tiers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors.torch import save

from imprint.adapters.adapter import Adapter, file_metadata, read_adapter_file

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SUFFIX = ".safetensors"


def _being_written(partial: Path) -> bool:
    """Whether another live process, such as a second worker, may be writing this file now."""
    writer = partial.name.split(".")[-2]
    if not writer.isdigit() or int(writer) == os.getpid():
        return False
    try:
        os.kill(int(writer), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


class AdapterStore:
    """A folder of adapters by id."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        for torn in self.root.glob("*.partial"):
            if not _being_written(torn):
                torn.unlink(missing_ok=True)

    def path(self, adapter_id: str) -> Path:
        """Where the adapter lies. Raises ValueError for an id that is no plain name."""
        if not _ID.fullmatch(adapter_id):
            raise ValueError(f"adapter id {adapter_id!r} must be letters, digits, '_' and '-'")
        return self.root / f"{adapter_id}{_SUFFIX}"

    def save(self, adapter_id: str, adapter: Adapter) -> int:
        """Write the adapter; returns its bytes on disk. A crash leaves the old file or the new."""
        path = self.path(adapter_id)
        tensors = adapter.to_tensors()
        blob = save(tensors, metadata=file_metadata(tensors, adapter.manifest))
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._sync_folder()
        return len(blob)

    def load(self, adapter_id: str) -> Adapter:
        """Read and verify. Raises KeyError if it is not there, CorruptAdapterError if broken."""
        try:
            return read_adapter_file(str(self.path(adapter_id)))
        except FileNotFoundError:
            raise KeyError(adapter_id) from None

    def delete(self, adapter_id: str) -> bool:
        """Remove; returns whether it was there. The removal is durable when this returns."""
        try:
            self.path(adapter_id).unlink()
        except FileNotFoundError:
            return False
        self._sync_folder()
        return True

    def ids(self) -> list[str]:
        """Ids of all stored adapters, sorted."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self.root.glob(f"*{_SUFFIX}"))

    def nbytes(self) -> int:
        """Bytes of all stored adapters."""
        return sum(path.stat().st_size for path in self.root.glob(f"*{_SUFFIX}"))

    def _sync_folder(self) -> None:
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
