"""Tensors and a manifest as one safetensors file that says whether it is whole and whose it is.

Knows formats and checksums; knows nothing of what the tensors mean or where files lie.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imprint.adapters.errors import CorruptAdapterError


def checksum(tensors: dict[str, Tensor], manifest: str) -> str:
    """sha256 over the manifest and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_metadata(
    tensors: dict[str, Tensor], manifest: dict[str, Any], format: str
) -> dict[str, str]:
    """What the header of a file says besides the tensors."""
    text = json.dumps(manifest, sort_keys=True)
    return {"format": format, "manifest": text, "sha256": checksum(tensors, text)}


def to_blob(tensors: dict[str, Tensor], manifest: dict[str, Any], format: str) -> bytes:
    """A whole file. The tensors lie on the host, contiguous."""
    return save(tensors, metadata=file_metadata(tensors, manifest, format))


def read_verified(path: Path | str, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and manifest of a file. Raises CorruptAdapterError naming it, FileNotFoundError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptAdapterError(f"{path} is not a whole safetensors file: {error}") from None
    if metadata.get("format") != format:
        raise CorruptAdapterError(f"{path} is no file of this version's format {format}")
    manifest = metadata.get("manifest", "")
    if checksum(tensors, manifest) != metadata.get("sha256"):
        raise CorruptAdapterError(f"{path} fails its checksum; delete it and adapt again")
    return tensors, json.loads(manifest)
