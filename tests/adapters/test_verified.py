"""Verified files as they lie in memory: read once, apart by kind, aligned, and no longer mapped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.errors import CorruptAdapterError
from imprint.adapters.tensor_file import sha256_of
from imprint.adapters.verified import file_metadata, read_verified, to_blob

FORMAT = "test-1"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of odd lengths and several types, an empty one and a single number among them."""
    random = torch.Generator().manual_seed(0)
    return {
        "document.tokens": torch.arange(7, dtype=torch.int32),
        "document.entropy": torch.rand(7, generator=random),
        "delta.a.x": torch.rand(1, 3, 5, generator=random),
        "delta.b.x": torch.rand(1, 5, 3, generator=random).bfloat16(),
        "state.0.S": torch.rand(1, 2, 3, 3, generator=random),
        "state.0.conv": torch.rand(1, 0, 3, generator=random),
        "state.1.S": torch.rand(1, 2, 3, 3, generator=random).double(),
        "state.1.count": torch.tensor(2**40),
    }


@pytest.fixture
def path(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_blob(tensors, {"seed": 1}, FORMAT))
    return path


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_every_bit_and_type_comes_back(path: Path, tensors: dict[str, Tensor]) -> None:
    found, manifest = read_verified(path, FORMAT)
    assert_same(found, tensors)
    assert manifest == {"seed": 1}


def test_what_becomes_of_the_file_later_does_not_matter(
    path: Path, tensors: dict[str, Tensor]
) -> None:
    found, _ = read_verified(path, FORMAT)
    # in place: what was mapped from it would be gone, and the process with it
    path.write_bytes(b"")
    assert_same(found, tensors)
    with pytest.raises(CorruptAdapterError, match=r"a\.safetensors is not a whole"):
        read_verified(path, FORMAT)


def test_parts_lie_apart_and_aligned(path: Path) -> None:
    found, _ = read_verified(path, FORMAT)
    own = {name: tensor.untyped_storage().data_ptr() for name, tensor in found.items()}
    parts: dict[int, set[str]] = {}
    for name, place in own.items():
        parts.setdefault(place, set()).add(name.partition(".")[0])
    assert all(len(kinds) == 1 for kinds in parts.values())
    assert all(place % 64 == 0 for place in parts)
    assert own["state.0.S"] == own["state.0.conv"]
    for name in ("delta.a.x", "document.entropy"):  # nor do they keep each other in memory
        assert found[name].untyped_storage().nbytes() == found[name].nbytes


def test_the_checksum_is_of_what_is_written_one_after_another(tensors: dict[str, Tensor]) -> None:
    digest = hashlib.sha256(b'{"seed": 1}')
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    assert file_metadata(tensors, {"seed": 1}, FORMAT)["sha256"] == digest.hexdigest()


@pytest.mark.parametrize("sizes", [[], [0], [1, 2**20, 1], [2**20, 2**20], [2**20 + 1, 3], [7] * 9])
def test_pieces_are_joined_without_a_difference(sizes: list[int]) -> None:
    pieces = [bytes([i]) * size for i, size in enumerate(sizes)]
    views = [memoryview(piece) for piece in pieces]
    assert sha256_of(views) == hashlib.sha256(b"".join(pieces)).hexdigest()


def lying(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"1234"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"\0" * 8,
        b"\xff" * 100,
        lying(b"[" * 100_000),
        lying(b"\xff"),
        lying([]),
        lying({}),
        lying({"__metadata__": {"format": 1}}),
        lying({"__metadata__": {"format": FORMAT, "manifest": "\ud800"}}),
        lying({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        lying({"x": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}),
        lying({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}),
        lying({"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}),
        lying({"x": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}),
        lying({"x": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}),
        lying({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}),
        lying({"x": {"dtype": "F32", "shape": [1]}}),
        lying({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
        lying({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        lying({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
    ],
)
def test_headers_that_lie_are_refused_by_the_file_s_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptAdapterError, match=r"a\.safetensors is not a whole"):
        read_verified(path, FORMAT)
