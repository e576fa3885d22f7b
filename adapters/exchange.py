"""An adapter's file as it is given away and taken in: read and checked without torch.

The twin of `verified.py` for files of strangers: nothing is believed before it is checked, and a
file that lies is refused by the name of what is wrong. Whether the tensors fit a model is for a
worker to say, which has one.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from imprint.adapters.config import NOT_SERVED, ConfigError, RefineConfig

FORMAT: Final = "imprint-adapter-1"
"""`adapter.FORMAT`; a test holds the two together."""
TOKENS: Final = "document.tokens"
MAX_HEADER_BYTES: Final = 4 * 2**20
_MAX_DIMENSIONS: Final = 8
_PIECE: Final = 2**20

_DTYPES: Final = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
}


class ForeignAdapterError(ValueError):
    """A file that is no adapter for this server."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        """adapter_torn, adapter_checksum_mismatch, adapter_format_mismatch,
        adapter_model_mismatch or adapter_manifest_invalid."""


@dataclass(frozen=True, slots=True)
class ForeignAdapter:
    """What a checked file says of itself."""

    checksum: str
    """Over its manifest and tensors."""
    num_tokens: int
    """Of the document."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_foreign(path: Path, *, model_hash: str) -> ForeignAdapter:
    """Check a whole file. Raises ForeignAdapterError that says what is wrong with it."""
    with path.open("rb") as file:
        metadata, tensors, start = _header(file, path.stat().st_size)
        if metadata.get("format") != FORMAT:
            raise ForeignAdapterError(
                "adapter_format_mismatch", f"the file is no adapter of the format {FORMAT}"
            )
        text = metadata.get("manifest", "")
        checksum = _checksum(file, text, tensors, start)
        if checksum != metadata.get("sha256"):
            raise ForeignAdapterError(
                "adapter_checksum_mismatch", "the file does not have the checksum that it names"
            )
        manifest = _json_object(text, "manifest")
        if manifest.get("model_hash") != model_hash:
            raise ForeignAdapterError(
                "adapter_model_mismatch",
                f"the adapter is of the model {str(manifest.get('model_hash'))[:64]}, "
                f"this server has {model_hash}",
            )
        tokens = _tokens(file, tensors, start)
    is_trained = any(name.startswith(("delta.", "start.")) for name in tensors)
    _check_manifest(manifest, tokens, is_trained=is_trained)
    return ForeignAdapter(checksum, len(tokens))


def _header(file: IO[bytes], size: int) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """Metadata, tensors, and where their bytes begin."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise ForeignAdapterError("adapter_torn", "the file is not a whole safetensors file")
    header = _json_object(file.read(length), "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ForeignAdapterError("adapter_torn", "the file's metadata is not made of strings")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    place = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != place:
            raise ForeignAdapterError("adapter_torn", f"{name[:200]!r} is not where it should be")
        place = tensor.end
    if place != size - 8 - length:
        raise ForeignAdapterError("adapter_torn", "the file is shorter or longer than it says")
    return metadata, tensors, 8 + length


def _tensor(name: str, entry: Any) -> _Tensor:
    try:
        dtype, width = _DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ForeignAdapterError(
            "adapter_torn", f"{name[:200]!r} is no tensor of a known type"
        ) from None
    numbers = (*shape[:_MAX_DIMENSIONS], begin, end)
    plain = all(type(number) is int and 0 <= number < 2**62 for number in numbers)
    if not plain or len(shape) > _MAX_DIMENSIONS or end - begin != width * math.prod(shape):
        raise ForeignAdapterError("adapter_torn", f"{name[:200]!r} has another size than it says")
    return _Tensor(dtype, shape, begin, end)


def _checksum(file: IO[bytes], manifest: str, tensors: dict[str, _Tensor], start: int) -> str:
    """As `verified.checksum` computes it."""
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tensor.shape};".encode())
        file.seek(start + tensor.begin)
        left = tensor.end - tensor.begin
        while left:
            piece = file.read(min(left, _PIECE))
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _tokens(file: IO[bytes], tensors: dict[str, _Tensor], start: int) -> array[int]:
    tensor = tensors.get(TOKENS)
    if tensor is None or tensor.dtype != "torch.int32" or len(tensor.shape) != 1:
        raise ForeignAdapterError("adapter_manifest_invalid", f"the file has no {TOKENS}")
    file.seek(start + tensor.begin)
    tokens = array("i")
    tokens.frombytes(file.read(tensor.end - tensor.begin))
    return tokens


def _check_manifest(manifest: dict[str, Any], tokens: array[int], *, is_trained: bool) -> None:
    """Raises for a manifest that does not describe the file, or from which nothing can be
    replayed."""
    kind, outcome = manifest.get("method"), manifest.get("outcome")
    if manifest.get("num_tokens") != len(tokens) or not tokens:
        raise _invalid("num_tokens")
    if manifest.get("document_sha256") != hashlib.sha256(tokens.tobytes()).hexdigest():
        raise _invalid("document_sha256")
    if kind not in ("read", "refine"):
        raise _invalid("method")
    if outcome not in ("succeeded", "rejected"):
        raise _invalid("outcome")
    if kind == "refine":
        _check_study(manifest)
    if is_trained is not (kind == "refine" and outcome == "succeeded"):
        raise _invalid("outcome")


def _check_study(manifest: dict[str, Any]) -> None:
    seed, config = manifest.get("seed"), manifest.get("config")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise _invalid("seed")
    if not isinstance(config, dict):
        raise _invalid("config")
    try:
        if RefineConfig.from_dict(config).scope == "full":
            raise ConfigError("scope", NOT_SERVED)
    except ConfigError as error:
        raise ForeignAdapterError(
            "adapter_manifest_invalid", f"the manifest's config: {str(error)[:200]}"
        ) from None


def _invalid(field: str) -> ForeignAdapterError:
    return ForeignAdapterError(
        "adapter_manifest_invalid", f"the manifest's {field} does not fit the file"
    )


def _json_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character would break what follows
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ForeignAdapterError("adapter_torn", f"the file's {what} is not a JSON object")
    return value
