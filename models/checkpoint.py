"""Checkpoint folders into models and back: config.json and model.safetensors, whole or in shards.

Reads safetensors only, into the architecture that config.json names; every tensor must be there,
with its shape, and nothing else. Reading goes tensor by tensor, straight to the device in the
target type: beside the model, host memory holds one tensor, the largest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.config import ModelConfig
from imprint.models.errors import CheckpointError
from imprint.models.names import LM_HEAD, LoadPlan, Piece, plan_load
from imprint.models.registry import build_model, load_config
from imprint.models.shards import INDEX_FILE, SINGLE_FILE, StoredTensor, stored_tensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_SHOWN_PROBLEMS = 5
_HEADER_BYTES, _ENTRY_BYTES = 32, 160  # of a safetensors header, its tensors' names aside; at most


def load_model(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FastWeightModel:
    """Load a checkpoint folder in eval mode, without gradients.

    Parameters get `dtype`, save those that the architecture keeps in float32 under a narrower one
    (`FastWeightModel.parameter_dtype`). Raises CheckpointError naming the file, key or tensor that
    is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint")
    model = skeleton(load_config(folder))
    plan = plan_checkpoint(model, folder)
    if plan.problems:
        shown = "; ".join(plan.problems[:_MAX_SHOWN_PROBLEMS])
        num_more = len(plan.problems) - _MAX_SHOWN_PROBLEMS
        more = f" (and {num_more} more)" if num_more > 0 else ""
        raise CheckpointError(f"{folder} does not fit its config.json: {shown}{more}")
    reader = _Reader(plan.sources, torch.device(device))
    tensors = {
        name: reader.read(piece, model.parameter_dtype(name, dtype))
        for name, piece in _in_file_order(plan.pieces)
    }
    _check_left_out(plan, tensors, reader)
    if model.config.tie_word_embeddings:
        tensors[LM_HEAD] = tensors["model.embeddings.weight"]
    model.load_state_dict(tensors, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    return model.eval().requires_grad_(False)


def skeleton(config: ModelConfig) -> FastWeightModel:
    """A model of `config` whose parameters have shapes but neither numbers nor memory."""
    with torch.device("meta"):
        return build_model(config)


def plan_checkpoint(model: FastWeightModel, folder: Path) -> LoadPlan:
    """How the files of `folder` fill `model`. Raises CheckpointError for files that are broken."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return plan_load(expected, stored_tensors(folder), tied=model.config.tie_word_embeddings)


def save_model(
    model: FastWeightModel,
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write config.json and the weights, in `dtype` if given: one file, or shards and their index.

    A shard is a file of at most `shard_bytes`, or of one tensor that is larger.
    """
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == LM_HEAD)
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save(folder)
    save_tensors(tensors, folder, shard_bytes=shard_bytes)


def save_tensors(
    tensors: dict[str, Tensor], folder: Path, *, shard_bytes: int | None = None
) -> None:
    """Write tensors as `save_model` does, in their order. Replaces an index that lies there."""
    if shard_bytes is None:
        save_file(tensors, folder / SINGLE_FILE)
        with suppress(FileNotFoundError):
            (folder / INDEX_FILE).unlink()
        return
    weight_map = save_shards(tensors, folder, stem="model", shard_bytes=shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_shards(
    tensors: dict[str, Tensor], folder: Path, *, stem: str, shard_bytes: int
) -> dict[str, str]:
    """Write tensors, in their order, to files `stem-00001-of-...`; the file of each by its name."""
    shards = list(_shards(tensors, shard_bytes))
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file_name)
        files.update(dict.fromkeys(names, file_name))
    return files


def weights_hash(model: FastWeightModel) -> str:
    """sha256 over names, shapes, dtypes and bytes of all weights, in the order of the names; and
    over the name of the layout of states, if it has one."""
    digest = hashlib.sha256(model.state_layout.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Reader:
    """Reads stored tensors to one device, by way of one buffer of the size of the largest.

    One buffer, not one a tensor: small tensors that stay would settle in the memory of large ones
    that are gone, and it would never be used again. Nothing is mapped: a file that is replaced
    while the model serves must not change it.
    """

    def __init__(self, sources: Iterable[StoredTensor], device: torch.device) -> None:
        self._device = device
        largest = max((source.nbytes for source in sources), default=0)
        self._buffer = torch.empty(largest, dtype=torch.uint8)

    def read(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """The rows of a piece on the device, in memory of their own."""
        stored_dtype = _DTYPES[piece.source.dtype]
        if self._device.type == "cpu" and dtype == stored_dtype:
            tensor = torch.empty(piece.shape, dtype=dtype)
            _fill(tensor.flatten().view(torch.uint8), piece)
            return tensor
        num_bytes = math.prod(piece.shape) * stored_dtype.itemsize
        _fill(self._buffer[:num_bytes], piece)
        raw = self._buffer[:num_bytes].view(stored_dtype).view(piece.shape)
        return raw.to(self._device).to(dtype)  # converted there: no second copy here

    def is_zero(self, source: StoredTensor) -> bool:
        """Whether every number of a tensor is zero, of either sign."""
        _fill(self._buffer[: source.nbytes], Piece(source, 0, source.shape))
        return not self._buffer[: source.nbytes].view(_DTYPES[source.dtype]).any()


def _fill(buffer_N: Tensor, piece: Piece) -> None:
    """Read the bytes of a piece into a buffer of their number."""
    source, num_rows = piece.source, piece.source.shape[0] if piece.source.shape else 1
    view = buffer_N.numpy().data
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.offset + piece.first_row * (source.nbytes // max(num_rows, 1)))
        while view:
            num_read = stream.readinto(view)
            if not num_read:
                raise CheckpointError(f"{source.file} ended while {source.name} was read")
            view = view[num_read:]


def _in_file_order(pieces: dict[str, Piece]) -> list[tuple[str, Piece]]:
    def place(item: tuple[str, Piece]) -> tuple[str, int, int]:
        source = item[1].source
        return source.file.name, source.offset, item[1].first_row

    return sorted(pieces.items(), key=place)


def _check_left_out(plan: LoadPlan, loaded: dict[str, Tensor], reader: _Reader) -> None:
    """What has no parameter of its own must change nothing: zeros, or a tied tensor's copy."""
    for source in plan.zeros:
        if not reader.is_zero(source):
            raise CheckpointError(
                f"{source.file}: {source.name} is not zero; the architecture has no place for it"
            )
    for name, source in plan.repeats.items():
        copy = reader.read(Piece(source, 0, source.shape), loaded[name].dtype)
        if not torch.equal(copy, loaded[name]):
            raise CheckpointError(
                f"{source.file}: {source.name} differs from {name}, "
                "and config.json says that the embeddings are tied"
            )


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = _HEADER_BYTES
    for name, tensor in tensors.items():
        num_bytes = tensor.nbytes + len(json.dumps(name)) + _ENTRY_BYTES
        if names and size + num_bytes > shard_bytes:
            yield names
            names, size = [], _HEADER_BYTES
        names.append(name)
        size += num_bytes
    if names:
        yield names
