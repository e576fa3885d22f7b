"""An adapter's file as it is given away and taken in: read and checked without torch.

The twin of `verified.py` for files of strangers: nothing is believed before it is checked, and a
file that lies is refused by the name of what is wrong. Whether the tensors fit a model is for a
worker to say, which has one.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from imprint.adapters.config import NOT_SERVED, RefineConfig
from imprint.adapters.errors import ConfigError
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

FORMAT: Final = "imprint-adapter-1"
"""`adapter.FORMAT`; a test holds the two together."""
TOKENS: Final = "document.tokens"
MAX_HEADER_BYTES: Final = 4 * 2**20
_PIECE: Final = 2**20


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


def read_foreign(path: Path, *, model_hash: str) -> ForeignAdapter:
    """Check a whole file. Raises ForeignAdapterError that says what is wrong with it."""
    with path.open("rb") as file:
        header, start = _header(file, path.stat().st_size)
        metadata, entries = header.metadata, header.entries
        if metadata.get("format") != FORMAT:
            raise ForeignAdapterError(
                "adapter_format_mismatch", f"the file is no adapter of the format {FORMAT}"
            )
        text = metadata.get("manifest", "")
        checksum = sha256_of(_pieces(file, text, entries, start))
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
        tokens = _tokens(file, entries, start)
    is_trained = any(name.startswith(("delta.", "start.")) for name in entries)
    _check_manifest(manifest, tokens, is_trained=is_trained)
    return ForeignAdapter(checksum, len(tokens))


def _header(file: IO[bytes], size: int) -> tuple[Header, int]:
    """The header, and where the bytes behind it begin."""
    try:
        length = header_bytes(file.read(LENGTH_BYTES), size, most=MAX_HEADER_BYTES)
        start = LENGTH_BYTES + length
        return parse_header(file.read(length), size - start), start
    except TornFileError as error:
        raise ForeignAdapterError("adapter_torn", f"the file is torn: {error}") from None


def _pieces(
    file: IO[bytes], manifest: str, entries: dict[str, Entry], start: int
) -> Iterator[bytes]:
    """What `verified.checksum` is of, read little by little."""
    yield manifest.encode()
    for name in sorted(entries):
        entry = entries[name]
        yield label(name, entry.dtype, entry.shape)
        file.seek(start + entry.begin)
        for left in range(entry.end - entry.begin, 0, -_PIECE):
            yield file.read(min(left, _PIECE))


def _tokens(file: IO[bytes], entries: dict[str, Entry], start: int) -> array[int]:
    entry = entries.get(TOKENS)
    if entry is None or entry.dtype != "torch.int32" or len(entry.shape) != 1:
        raise ForeignAdapterError("adapter_manifest_invalid", f"the file has no {TOKENS}")
    file.seek(start + entry.begin)
    tokens = array("i")
    tokens.frombytes(file.read(entry.end - entry.begin))
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


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a character would break what follows
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ForeignAdapterError("adapter_torn", f"the file's {what} is not a JSON object")
    return value
