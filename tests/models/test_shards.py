"""What lies on disk: headers, shards and their index, read without trusting them; peak memory."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from imprint.models import CheckpointError, load_model, save_model, weights_hash
from imprint.models.architecture import FastWeightModel
from imprint.models.shards import INDEX_FILE, read_header, stored_tensors


def write_raw(file: Path, header: Any, data: bytes = b"") -> Path:
    """A file whose header is any JSON value."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_headers_say_where_the_bytes_are(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in {"b": (3, 5), "a": (7,), "c": (2, 1, 4), "empty": (0, 3)}.items()
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    found = read_header(tmp_path / "x.safetensors")
    assert {tensor.name for tensor in found} == set(tensors)
    for tensor in found:
        expected = tensors[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
        assert tensor.shape == tuple(tensors[tensor.name].shape)
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == expected


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ([], b"", "not a whole safetensors file"),
        ({"a": 1}, b"", "not a whole safetensors file"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "data_offsets"),
        ({"a": entry(0, 4, [2])}, b"1234", r"a has 4 bytes for shape \(2,\)"),
        ({"a": entry(0, 4, [-1])}, b"1234", r"a has shape \(-1,\)"),
        ({"a": entry(4, 8, [1])}, b"12345678", "do not follow those before"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234", "do not follow those before"),
        ({"a": entry(0, 4, [1])}, b"123", "its header says"),
        ({"a": entry(0, 4, [1])}, b"12345", "its header says"),
        ({"a": {**entry(0, 4, [1]), "data_offsets": [0, "4"]}}, b"1234", "data_offsets are"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_name_that_stands_twice_in_a_header(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="twice"):
        read_header(tmp_path / "model.safetensors")


def test_endless_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="header would be"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", 3, "", "..", "x.bin"]
)
def test_index_names_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="must be the name of a"):
        stored_tensors(tmp_path)


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "2.safetensors")
    index = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"puts c into 2\.safetensors: it is not there"):
        stored_tensors(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for file in ("1", "2"):
        tensors = {"a": torch.zeros(1), file: torch.zeros(1)}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    index = {"a": "1.safetensors", "2": "2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"both 1\.safetensors and 2\.safetensors hold a"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 10**9])
def test_shards_are_written_and_read_alike(
    tiny_model: FastWeightModel, tmp_path: Path, shard_bytes: int
) -> None:
    save_model(tiny_model, tmp_path, shard_bytes=shard_bytes)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny_model.parameters())
    sizes = [[tensor.nbytes for tensor in read_header(file)] for file in files]
    assert all(sum(size) <= shard_bytes or len(size) == 1 for size in sizes)
    assert weights_hash(load_model(tmp_path)) == weights_hash(tiny_model)
    save_model(tiny_model, tmp_path)  # a whole file takes the index's place
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "whole")
    assert weights_hash(load_model(tmp_path)) == weights_hash(tiny_model)


def test_weights_do_not_change_with_the_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    model = load_model(folder)
    before = weights_hash(model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)
    assert weights_hash(model) == before


_MEASURE = """
import ctypes, re, sys, torch
from pathlib import Path
from imprint.models.checkpoint import load_model

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
load_model(sys.argv[1], device=sys.argv[3], dtype=torch.bfloat16)  # loads libraries
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
start = status("VmRSS")
model = load_model(sys.argv[2], device=sys.argv[3], dtype=torch.bfloat16)
print(status("VmHWM") - start, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 MB of float32 in a few shards."""
    from imprint.models.fake import write_fake

    folder = tmp_path_factory.mktemp("big") / "checkpoint"
    size = {"layers": 6, "hidden": 512, "vocab": 4096, "shard_bytes": 24_000_000}
    write_fake("delta_net-1.3B", folder, dtype="float32", **size)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_peak_host_memory_is_below_the_largest_shard(
    big_checkpoint: Path, tiny_checkpoint: Path, device: str
) -> None:
    """On the device "meta", as on a GPU, no weight stays in host memory; on the CPU the model does,
    and is not counted."""
    shards = [file.stat().st_size for file in big_checkpoint.glob("*.safetensors")]
    assert len(shards) >= 4
    command = [sys.executable, "-c", _MEASURE, str(tiny_checkpoint), str(big_checkpoint), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    peak, model_bytes = map(int, done.stdout.split())
    beside = peak - (model_bytes if device == "cpu" else 0)
    assert beside < 1.2 * max(shards)
