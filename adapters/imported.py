"""Whether the tensors of a foreign adapter fit a model: names, shapes, types and values.

The second half of `exchange.py`, for a process that has the model. Nothing of the file is used
before all of it fits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprint.adapters.adapter import FORMAT, Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.delta import delta_dtype, delta_targets
from imprint.adapters.errors import AdaptationError
from imprint.adapters.verified import read_verified
from imprint.models import FastWeightModel

CODE = "adapter_does_not_fit"


def read_import(path: Path, model: FastWeightModel) -> Adapter:
    """The adapter of a file that `exchange.read_foreign` has checked.

    Raises AdaptationError naming the first tensor that does not fit the model, CorruptAdapterError
    where the file has changed since.
    """
    try:
        tensors, manifest = read_verified(path, FORMAT)
    except FileNotFoundError:
        raise AdaptationError("adapter_not_found", "the imported file is gone") from None
    _check_form(tensors, _expected(manifest, model))
    _check_values(tensors, manifest["num_tokens"], model)
    return Adapter.from_tensors(tensors, manifest)


def _expected(manifest: dict[str, Any], model: FastWeightModel) -> dict[str, Tensor]:
    """Tensors of the names, shapes and types that this file must have; without values."""
    num_tokens = manifest["num_tokens"]
    expected = {
        "document.tokens": _like(torch.int32, num_tokens),
        "document.entropy": _like(torch.float32, num_tokens),
        **model.init_state(1).to_tensors(),
    }
    if manifest["method"] == "refine" and manifest["outcome"] == "succeeded":
        expected |= _expected_trained(RefineConfig.from_dict(manifest["config"]), model)
    return expected


def _expected_trained(config: RefineConfig, model: FastWeightModel) -> dict[str, Tensor]:
    """What a study of these settings leaves beside the state."""
    if config.scope == "state":
        return model.init_state(1).to_tensors("start.")
    rank, dtype = config.lora_rank, delta_dtype(model)
    expected = {}
    for name, (width_in, width_out) in delta_targets(model, config).items():
        expected[f"delta.a.{name}"] = _like(dtype, 1, rank, width_in)
        expected[f"delta.b.{name}"] = _like(dtype, 1, width_out, rank)
    return expected


def _like(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _check_form(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted({*tensors, *expected}):
        found, wanted = tensors.get(name), expected.get(name)
        if found is None:
            raise AdaptationError(CODE, f"the file has no {name}")
        if wanted is None:
            raise AdaptationError(CODE, f"the model has no {name[:200]!r}")
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise AdaptationError(
                CODE,
                f"{name} is {found.dtype} {list(found.shape)}, "
                f"the model has {wanted.dtype} {list(wanted.shape)}",
            )


def _check_values(tensors: dict[str, Tensor], num_tokens: int, model: FastWeightModel) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            fits = bool(tensor.isfinite().all())
        else:  # a token, or a place in the document
            limit = model.config.vocab_size - 1 if name == "document.tokens" else num_tokens
            fits = bool(((tensor >= 0) & (tensor <= limit)).all())
        if not fits:
            raise AdaptationError(CODE, f"{name} holds numbers that cannot be there")
