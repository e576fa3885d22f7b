"""Adapters on disk: one verified file each, written atomically. Knows nothing of memory tiers."""

from __future__ import annotations

from imprint.adapters.adapter import FORMAT, Adapter, read_adapter_file
from imprint.adapters.files import FileFolder
from imprint.adapters.verified import to_blob


class AdapterStore(FileFolder):
    """A folder of adapters by id."""

    def save(self, adapter_id: str, adapter: Adapter) -> int:
        """Write the adapter; returns its bytes on disk. A crash leaves the old file or the new."""
        self.path(adapter_id)  # a bad id is refused before the work
        blob = to_blob(adapter.to_tensors(), adapter.manifest, FORMAT)
        self.write(adapter_id, blob, durable=True)
        return len(blob)

    def load(self, adapter_id: str) -> Adapter:
        """Read and verify. Raises KeyError if it is not there, CorruptAdapterError if broken,
        StoreGoneError where the whole folder is gone."""
        try:
            return read_adapter_file(str(self.path(adapter_id)))
        except FileNotFoundError:
            self.refuse_a_lost_folder()
            raise KeyError(adapter_id) from None
