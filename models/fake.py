"""Writes random checkpoints in the shape of public ones: for tests, and for speed without weights.

The model answers noise. Holds the whole model once, in the type on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.checkpoint import save_tensors, skeleton
from imprint.models.config import ModelConfig
from imprint.models.errors import CheckpointError
from imprint.models.names import LM_HEAD, fuse_mlp, unused_d_names
from imprint.models.prompts import DEFAULT_QUESTION_TEMPLATE
from imprint.models.public import PUBLIC_MODELS, sized_config
from imprint.models.registry import parse_config

DTYPES: Final = ("float32", "bfloat16", "float16")
SHARD_BYTES: Final = 2**31

_SPECIAL = ("<unk>", "<s>", "</s>")
_MIN_VOCAB = len(_SPECIAL) + 256


def write_fake(
    like: str,
    folder: Path,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    vocab: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
) -> int:
    """Write a checkpoint like the public one called `like` into a new or empty folder.

    Configuration, type on disk and spelling of the tensors are the public ones, save what is
    given here. A byte-level tokenizer is written beside it. Returns the number of parameters;
    raises CheckpointError for a name, size or folder that cannot be.
    """
    public = PUBLIC_MODELS.get(like)
    if public is None:
        raise CheckpointError(f"no public model {like!r} is known here: {', '.join(PUBLIC_MODELS)}")
    dtype = dtype or public.dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_bytes < 1:
        raise CheckpointError(f"shard_bytes must be at least 1, got {shard_bytes}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder")
    config = parse_config(sized_config(public, layers=layers, hidden=hidden, vocab=vocab))
    if config.vocab_size < _MIN_VOCAB:
        raise CheckpointError(
            f"vocab_size must be at least {_MIN_VOCAB}, for every byte a token, "
            f"got {config.vocab_size}"
        )
    model = _random_model(config, getattr(torch, dtype), seed)
    tensors = _spelled(model, fused_mlp=public.fused_mlp, unused_d=public.unused_d)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)
    save_tensors(tensors, folder, shard_bytes=shard_bytes)
    _write_tokenizer(folder, config.vocab_size)
    card = f"# Random weights\n\nShaped like {public.hub_id}; trained on nothing (seed {seed}).\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def _random_model(config: ModelConfig, dtype: torch.dtype, seed: int) -> FastWeightModel:
    model = skeleton(config).to(dtype).to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    model.reset_parameters(seed)
    return model


def _spelled(model: FastWeightModel, *, fused_mlp: bool, unused_d: bool) -> dict[str, Tensor]:
    """The tensors as the public files have them."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors[LM_HEAD]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if fused_mlp:
        tensors = {
            name: torch.cat([tensors[part] for part in parts])
            for name, parts in fuse_mlp(shapes).items()
        }
    if unused_d:
        for name, shape in unused_d_names(shapes).items():
            tensors[name] = torch.zeros(shape, dtype=model.dtype)
    return tensors


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every byte a token, no merges; the rest of the vocabulary is only ever generated."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġt{i}" for i in range(len(tokens), vocab_size)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"question_template": DEFAULT_QUESTION_TEMPLATE}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
