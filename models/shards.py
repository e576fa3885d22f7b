"""Safetensors files of a checkpoint folder: which tensors they hold and where their bytes lie.

Reads headers and the shard index, never a tensor; imports no torch. The format is that of
https://github.com/huggingface/safetensors: a length (8 bytes, little endian), a JSON header of
that length, then the bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imprint.models.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
ITEM_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per number of the types that are read, by their name in the header."""

_SUFFIX = ".safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor on disk."""

    name: str
    file: Path
    dtype: str
    """As in the header: F32, BF16, F16, ... also types that are not in `ITEM_BYTES`."""
    shape: tuple[int, ...]
    offset: int
    """Byte of the file at which the tensor begins."""
    nbytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder`, by name: one file, or the shards of its index.

    Where there is an index, it is followed and `model.safetensors` is not looked at. Raises
    CheckpointError naming the file that is missing, torn or not of the format, or the tensor that
    two shards hold, or that the index puts into a shard that does not hold it.
    """
    index = folder / INDEX_FILE
    weight_map = read_weight_map(index) if index.is_file() else None
    names = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_header(folder / name):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise CheckpointError(f"{folder}: both {other} and {name} hold {tensor.name}")
            tensors[tensor.name] = tensor
    for tensor_name, file_name in (weight_map or {}).items():
        if tensor_name not in tensors or tensors[tensor_name].file.name != file_name:
            raise CheckpointError(f"{index} puts {tensor_name} into {file_name}: it is not there")
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of a shard index: tensor name -> file name in the same folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index} is not a JSON object whose weight_map names each tensor's file"
        ) from None
    for tensor, file in pairs:
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(_SUFFIX)
        if not plain:
            raise CheckpointError(
                f"{index}: weight_map gives {file!r} for {tensor}; it must be the name of a "
                f"{_SUFFIX} file in the folder"
            )
    return dict(pairs)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes."""
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent} holds no {file.name}; only safetensors checkpoints are read"
        )
    try:
        return list(_parse(file))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None


def _parse(file: Path) -> Iterator[StoredTensor]:
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"its header would be {header_bytes} bytes long")
        header = json.loads(stream.read(header_bytes), object_pairs_hook=_without_repeats)
    end = start = 8 + header_bytes
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: _offsets(item[1])):
        first, last = _offsets(entry)
        shape = tuple(entry["shape"])
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{name} has shape {shape}")
        item_bytes = ITEM_BYTES.get(entry["dtype"])
        if item_bytes is not None and last - first != item_bytes * math.prod(shape):
            raise ValueError(f"{name} has {last - first} bytes for shape {shape}")
        if start + first != end or last < first:
            raise ValueError(f"the bytes of {name} do not follow those before it")
        end = start + last
        yield StoredTensor(
            name=name,
            file=file,
            dtype=entry["dtype"],
            shape=shape,
            offset=start + first,
            nbytes=last - first,
        )
    if file.stat().st_size != end:
        raise ValueError(f"it has {file.stat().st_size} bytes, its header says {end}")


def _offsets(entry: dict[str, Any]) -> tuple[int, int]:
    first, last = entry["data_offsets"]
    if type(first) is not int or type(last) is not int:
        raise ValueError(f"data_offsets are {entry['data_offsets']!r}")
    return first, last


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name stands in it twice")
    return dict(pairs)
