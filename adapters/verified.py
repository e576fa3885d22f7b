"""Tensors and a manifest as one safetensors file that says whether it is whole and whose it is.

Knows formats and checksums; knows nothing of what the tensors mean or where files lie. A file is
read once, checked as it lies in memory, and not looked at again: nothing is mapped from it, so what
becomes of it later does not matter.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor

from imprint.adapters.errors import CorruptAdapterError
from imprint.adapters.tensor_file import (
    LENGTH_BYTES,
    Entry,
    Header,
    TornFileError,
    header_bytes,
    label,
    parse_header,
    sha256_of,
)

MAX_HEADER_BYTES: Final = 100_000_000
"""As much as the format allows."""
_DTYPES: Final = {
    str(dtype): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
    )
}


def checksum(tensors: dict[str, Tensor], manifest: str) -> str:
    """sha256 over the manifest and every tensor's name, type, shape and bytes."""
    pieces: list[bytes | memoryview] = [manifest.encode()]
    for name in sorted(tensors):
        tensor = tensors[name]
        pieces.append(label(name, tensor.dtype, tuple(tensor.shape)))
        pieces.append(_bytes_of(tensor))
    return sha256_of(pieces)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def file_metadata(
    tensors: dict[str, Tensor], manifest: dict[str, Any], format: str
) -> dict[str, str]:
    """What the header of a file says besides the tensors."""
    text = json.dumps(manifest, sort_keys=True)
    return {"format": format, "manifest": text, "sha256": checksum(tensors, text)}


def to_blob(tensors: dict[str, Tensor], manifest: dict[str, Any], format: str) -> bytes:
    """A whole file. The tensors lie on the host, contiguous, and are of types that can be read."""
    assert all(str(tensor.dtype) in _DTYPES for tensor in tensors.values())
    return save(tensors, metadata=file_metadata(tensors, manifest, format))


def read_verified(path: Path | str, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a file. Raises CorruptAdapterError naming it, FileNotFoundError.

    Tensors are views of memory that they share with those whose names begin alike, up to the first
    dot: what is of another kind can be let go by itself.
    """
    try:
        with open(path, "rb") as file:
            header = _read_header(file)
            if header.metadata.get("format") != format:
                raise CorruptAdapterError(f"{path} is no file of this version's format {format}")
            parts = [
                (entries, _read_part(file, entries[-1][1].end - entries[0][1].begin))
                for entries in _parts(header)
            ]
    except TornFileError as error:
        raise CorruptAdapterError(f"{path} is not a whole safetensors file: {error}") from None
    manifest = header.metadata.get("manifest", "")
    if _checksum(parts, manifest) != header.metadata.get("sha256"):
        raise CorruptAdapterError(f"{path} fails its checksum; delete it and adapt again")
    tensors = {name: tensor for part in parts for name, tensor in _tensors(*part)}
    return tensors, json.loads(manifest)


Part = tuple[list[tuple[str, Entry]], Tensor]
"""Tensors of one type that lie side by side, with their bytes."""


def _read_header(file: BufferedReader) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = header_bytes(file.read(LENGTH_BYTES), size, most=MAX_HEADER_BYTES)
    return parse_header(file.read(length), size - LENGTH_BYTES - length)


def _parts(header: Header) -> list[list[tuple[str, Entry]]]:
    """What lies side by side, is of one type and has names that begin alike."""
    groups = itertools.groupby(
        header.entries.items(), lambda item: (item[0].partition(".")[0], item[1].dtype)
    )
    return [list(entries) for _, entries in groups]


def _read_part(file: BufferedReader, num_bytes: int) -> Tensor:
    """The next bytes, in memory aligned as torch aligns."""
    data = torch.empty(num_bytes, dtype=torch.uint8)
    if file.readinto(data.numpy().data) != num_bytes:
        raise TornFileError("it became shorter while it was read")
    return data


def _checksum(parts: list[Part], manifest: str) -> str:
    """As `checksum` computes it."""
    found: dict[str, tuple[Entry, memoryview]] = {}
    for entries, data in parts:
        view, first = data.numpy().data, entries[0][1].begin
        for name, entry in entries:
            found[name] = entry, view[entry.begin - first : entry.end - first]
    pieces: list[bytes | memoryview] = [manifest.encode()]
    for name in sorted(found):
        entry, view = found[name]
        pieces += (label(name, entry.dtype, entry.shape), view)
    return sha256_of(pieces)


def _tensors(entries: list[tuple[str, Entry]], data: Tensor) -> Iterator[tuple[str, Tensor]]:
    dtype = _DTYPES[entries[0][1].dtype]
    lengths = [(entry.end - entry.begin) // dtype.itemsize for _, entry in entries]
    pieces = data.view(dtype).split_with_sizes(lengths)
    for (name, entry), piece in zip(entries, pieces, strict=True):
        yield name, piece.view(entry.shape)
