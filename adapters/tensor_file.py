"""What the header of a safetensors file says, believed only where it fits the file; and checksums.

Everything is checked before it is used, because files are torn, and strangers' files lie. Reads no
file itself and loads no torch, so that the API process can check what is imported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

LENGTH_BYTES: Final = 8
"""A file begins with the length of its header, little endian."""
_MAX_DIMENSIONS: Final = 8
_JOINED_BYTES: Final = 2**20

_DTYPES: Final = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
}


_Size = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class _Tensor(msgspec.Struct):
    """A tensor as the header has it."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32"]
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


_HEADER: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_METADATA: Final = msgspec.json.Decoder(dict[str, str])
_TENSOR: Final = msgspec.json.Decoder(_Tensor)
_NO_METADATA: Final = msgspec.Raw(b"{}")


class TornFileError(ValueError):
    """A file that is not a whole safetensors file of known types; says what is wrong with it."""


class Entry(NamedTuple):
    """One tensor: its type by torch's name, and where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    """By name, in the order in which they lie in the file, without gaps."""


def header_bytes(beginning: bytes, size: int, *, most: int) -> int:
    """Length of the header of a file of `size` bytes that begins so. Raises TornFileError."""
    length = int.from_bytes(beginning, "little")
    if len(beginning) < LENGTH_BYTES or not 0 < length <= min(size - LENGTH_BYTES, most):
        raise TornFileError("it is not a whole safetensors file")
    return length


def parse_header(text: bytes, data_bytes: int) -> Header:
    """The header of a file with so many bytes behind it. Raises TornFileError."""
    try:
        header = _HEADER.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TornFileError("its header is not a JSON object") from None
    found = header.pop("__metadata__", _NO_METADATA)
    try:
        metadata = _METADATA.decode(found)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TornFileError("its metadata is not made of strings") from None
    entries = [(name, _entry(name, raw)) for name, raw in header.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    place = 0
    for name, entry in entries:
        if entry.begin != place:
            raise TornFileError(f"{name[:200]!r} is not where it should be")
        place = entry.end
    if place != data_bytes:
        raise TornFileError("it is shorter or longer than it says")
    return Header(metadata, dict(entries))


def _entry(name: str, raw: msgspec.Raw) -> Entry:
    try:
        found = _TENSOR.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise TornFileError(f"{name[:200]!r} is no tensor of a known type") from None
    begin, end = found.data_offsets
    dtype, width = _DTYPES[found.dtype]
    if end - begin != width * math.prod(found.shape):
        raise TornFileError(f"{name[:200]!r} has another size than it says")
    return Entry(dtype, found.shape, begin, end)


def label(name: str, dtype: object, shape: tuple[int, ...]) -> bytes:
    """What a checksum has of a tensor before its bytes."""
    return f"{name}:{dtype}:{shape};".encode()


def sha256_of(pieces: Iterable[bytes | memoryview]) -> str:
    """The checksum of all pieces one after another, in hexadecimal. Views are of bytes.

    Small pieces are joined first: each update of a digest lets other threads run and waits for its
    turn again, which takes longer than a copy.
    """
    digest = hashlib.sha256()
    joined: list[bytes | memoryview] = []
    num_bytes = 0
    for piece in pieces:
        if num_bytes + len(piece) > _JOINED_BYTES:
            digest.update(b"".join(joined))
            joined, num_bytes = [], 0
        if len(piece) > _JOINED_BYTES:
            digest.update(piece)
        else:
            joined.append(piece)
            num_bytes += len(piece)
    digest.update(b"".join(joined))
    return digest.hexdigest()
