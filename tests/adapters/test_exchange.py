"""Files of strangers: believed only where they are whole, of this format, model and form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters import exchange
from imprint.adapters.adapter import FORMAT, Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.delta import init_delta
from imprint.adapters.document import DocumentReader
from imprint.adapters.errors import AdaptationError
from imprint.adapters.exchange import ForeignAdapterError, read_foreign
from imprint.adapters.imported import read_import
from imprint.adapters.verified import to_blob
from imprint.models import DeltaNet

HASH = "a" * 64


@pytest.fixture(scope="module")
def adapter(tiny_model: DeltaNet) -> Adapter:
    """As a study with rank 2 leaves it."""
    reader = DocumentReader(tiny_model, list(range(1, 30)), segment_tokens=8)
    list(reader.run())
    assert reader.adapter is not None
    config = RefineConfig.from_dict({"lora_rank": 2})
    manifest = {**reader.adapter.manifest, "method": "refine", "seed": 3, "model_hash": HASH}
    return Adapter(
        tokens_T=reader.adapter.tokens_T,
        entropy_T=reader.adapter.entropy_T,
        state=reader.adapter.state,
        delta=init_delta(tiny_model, config, seed=0).detach(),
        manifest={**manifest, "config": config.to_dict()},
    )


@pytest.fixture
def write(adapter: Adapter, tmp_path: Path) -> Callable[..., Path]:
    """A file with some of its tensors and some of its manifest changed, its checksum right."""

    def write(
        tensors: dict[str, Tensor | None] | None = None, format: str = FORMAT, **manifest: Any
    ) -> Path:
        changed = {**adapter.to_tensors(), **(tensors or {})}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        path = tmp_path / "file.safetensors"
        path.write_bytes(to_blob(kept, {**adapter.manifest, **manifest}, format))
        return path

    return write


def code(path: Path) -> str:
    with pytest.raises(ForeignAdapterError) as refusal:
        read_foreign(path, model_hash=HASH)
    return refusal.value.code


def test_a_whole_file(write: Callable[..., Path], adapter: Adapter, tiny_model: DeltaNet) -> None:
    path = write()
    assert read_foreign(path, model_hash=HASH).num_tokens == 29
    read = read_import(path, tiny_model)
    path.write_bytes(bytes(path.stat().st_size))  # nothing is mapped from it any more
    found, expected = read.to_tensors(), adapter.to_tensors()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert read.manifest == adapter.manifest
    assert exchange.FORMAT == FORMAT


def test_other_formats_and_models(write: Callable[..., Path]) -> None:
    assert code(write(format="imprint-adapter-2")) == "adapter_format_mismatch"
    path = write(model_hash="b" * 64)
    with pytest.raises(ForeignAdapterError, match=f"{'b' * 64}.*{HASH}"):
        read_foreign(path, model_hash=HASH)
    assert code(write(model_hash=None)) == "adapter_model_mismatch"


def test_a_changed_bit(write: Callable[..., Path]) -> None:
    path = write()
    data = path.read_bytes()
    for place in (len(data) - 1, data.index(b"succeeded")):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert code(path) == "adapter_checksum_mismatch"


def test_torn_files(write: Callable[..., Path]) -> None:
    path = write()
    data = path.read_bytes()
    for torn in (b"", b"abc", data[:8], data[:100], data[:-1], data + b"x", b"\xff" * 100):
        path.write_bytes(torn)
        assert code(path) == "adapter_torn"


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"\xff",
        b"9" * 5000,
        [],
        {"__metadata__": []},
        {"__metadata__": {"format": 1}},
        {"__metadata__": {"format": "\ud800"}},
        {"x": 1},
        {"x": {"dtype": [], "shape": [], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [], "data_offsets": "04"}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
        {"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**63]}},
        {"x": {"dtype": "F32", "shape": [2**61] * 200_000, "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any) -> None:
    assert code(raw(tmp_path / "file", header, b"1234")) == "adapter_torn"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_tokens", 28),
        ("document_sha256", "0" * 64),
        ("method", "../../etc/passwd"),
        ("outcome", "failed"),
        ("outcome", "rejected"),  # with a delta
        ("seed", -1),
        ("seed", True),
        ("config", None),
    ],
)
def test_manifests_that_lie(write: Callable[..., Path], field: str, value: Any) -> None:
    path = write(**{field: value})
    with pytest.raises(ForeignAdapterError, match=field) as refusal:
        read_foreign(path, model_hash=HASH)
    assert refusal.value.code == "adapter_manifest_invalid"


def test_a_config_that_cannot_be(write: Callable[..., Path]) -> None:
    assert code(write(config={"lora_rank": 0})) == "adapter_manifest_invalid"
    assert code(write({"document.tokens": None})) == "adapter_manifest_invalid"


@pytest.mark.parametrize("change", ["gone", "shape", "type", "inf", "more"])
@pytest.mark.parametrize("kind", ["state.", "delta.a.", "delta.b.", "document.entropy"])
def test_tensors_that_do_not_fit(
    write: Callable[..., Path], adapter: Adapter, tiny_model: DeltaNet, kind: str, change: str
) -> None:
    name, tensor = next(x for x in adapter.to_tensors().items() if x[0].startswith(kind))
    changed: dict[str, dict[str, Tensor | None]] = {
        "gone": {name: None},
        "shape": {name: torch.zeros(*tensor.shape, 2)},
        "type": {name: tensor.double()},
        "inf": {name: torch.full_like(tensor, float("inf"))},
        "more": {f"{kind}../../x": tensor.clone()},
    }
    path = write(changed[change])
    read_foreign(path, model_hash=HASH)  # without a model nobody can tell
    with pytest.raises(AdaptationError, match=kind.rstrip(".")) as refusal:
        read_import(path, tiny_model)
    assert refusal.value.code == "adapter_does_not_fit"


@pytest.mark.parametrize("token", [-1, 257])
def test_tokens_outside_the_vocabulary(
    write: Callable[..., Path], tiny_model: DeltaNet, token: int
) -> None:
    tokens = torch.full((29,), token, dtype=torch.int32)
    sha256 = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    path = write({"document.tokens": tokens}, document_sha256=sha256)
    read_foreign(path, model_hash=HASH)
    with pytest.raises(AdaptationError, match=r"document\.tokens"):
        read_import(path, tiny_model)
