"""Checkpoint folders: config.json, model.safetensors (one file or sharded), tokenizer.json.

Loads safetensors only, into the architecture that config.json names; every tensor must be there,
with its shape, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprint.models.config import ModelConfig
from imprint.models.deltanet import DeltaNet
from imprint.models.errors import CheckpointError

ARCHITECTURES: dict[str, type[DeltaNet]] = {"delta_net": DeltaNet}
"""Model classes by `model_type` of config.json."""


def load_model(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DeltaNet:
    """Load a checkpoint folder in eval mode, without gradients.

    Raises CheckpointError naming the file, key or tensor that is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint")
    config = ModelConfig.load(folder)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(
            f"config: model_type {config.model_type!r} is not supported (supported: {known})"
        )
    with torch.device("meta"):
        model = architecture(config)
    tensors = _read_tensors(folder)
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("model.embeddings.weight", torch.empty(0)))
    _check(model, tensors, folder)
    tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    return model.eval().requires_grad_(False)


def save_model(model: DeltaNet, path: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, in `dtype` if given."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save(folder)
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(tensors, folder / "model.safetensors")


def weights_hash(model: DeltaNet) -> str:
    """sha256 over names, shapes, dtypes and bytes of all weights, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in _file_names(folder):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds no {name}; only safetensors checkpoints are read"
            )
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from None
    return tensors


def _file_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index} is not a JSON object whose weight_map names each tensor's file"
        ) from None


def _check(model: DeltaNet, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [
        f"missing {name} {shape}" for name, shape in expected.items() if name not in tensors
    ]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, config.json implies {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{folder} does not fit its config.json: {'; '.join(problems[:5])}{more}"
        )
