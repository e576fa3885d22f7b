"""What an adapter is made of, and the checksum over it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imprint.adapters.adapter import FORMAT, Adapter, read_adapter_file
from imprint.adapters.verified import checksum, file_metadata
from imprint.models import DeltaNet, LoraDelta, RecurrentState


def adapter_with_delta(model: DeltaNet, adapter: Adapter) -> Adapter:
    delta = LoraDelta.init(model.lora_targets(), 2, seed=0)
    return dataclasses.replace(adapter, delta=delta, manifest={"seed": 1})


def test_tensors_are_on_the_host_named_and_compact(
    tiny_model: DeltaNet, read_adapter: Adapter
) -> None:
    tensors = adapter_with_delta(tiny_model, read_adapter).to_tensors()
    assert tensors["document.tokens"].dtype == torch.int32
    assert tensors["document.entropy"].dtype == torch.float32
    assert {"state.0.S", "state.1.conv_v", "delta.a.layers.0.attn.q_proj"} <= set(tensors)
    assert all(t.device.type == "cpu" and t.is_contiguous() for t in tensors.values())
    assert not any(t.requires_grad for t in tensors.values())


def test_round_trip(tiny_model: DeltaNet, read_adapter: Adapter) -> None:
    for adapter in (read_adapter, adapter_with_delta(tiny_model, read_adapter)):
        back = Adapter.from_tensors(adapter.to_tensors(), adapter.manifest)
        assert back.adapted == adapter.adapted
        assert torch.equal(back.tokens_T, adapter.tokens_T)
        assert torch.equal(back.entropy_T, adapter.entropy_T)
        for got, right in zip(back.state.tensors(), adapter.state.tensors(), strict=True):
            assert torch.equal(got, right)
        assert back.manifest == adapter.manifest


def test_restored_adapter_answers_the_same(
    tiny_model: DeltaNet, read_adapter: Adapter, tmp_path: Path
) -> None:
    adapter = adapter_with_delta(tiny_model, read_adapter)
    tensors = adapter.to_tensors()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata=file_metadata(tensors, adapter.manifest, FORMAT))
    back = read_adapter_file(str(path))
    question = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        right, _ = tiny_model(question, adapter.state, delta=adapter.delta)
        got, _ = tiny_model(question, back.state, delta=back.delta)
    assert torch.equal(got, right)


def test_checksum_sees_values_names_shapes_types_and_manifest() -> None:
    tensors = {"a": torch.arange(4, dtype=torch.int32), "b": torch.zeros(2, 2)}
    right = checksum(tensors, "{}")
    assert right == checksum(dict(reversed(tensors.items())), "{}")
    for changed in (
        {**tensors, "a": torch.tensor([0, 1, 2, 4], dtype=torch.int32)},
        {**tensors, "a": tensors["a"].view(2, 2)},
        {**tensors, "b": torch.zeros(2, 2, dtype=torch.int32)},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
    ):
        assert checksum(changed, "{}") != right
    assert checksum(tensors, "{ }") != right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_state_type_is_kept(
    read_adapter: Adapter, tmp_path: Path, dtype: torch.dtype
) -> None:
    layers = tuple(
        {name: tensor.to(dtype) for name, tensor in layer.items()}
        for layer in read_adapter.state.layers
    )
    adapter = dataclasses.replace(read_adapter, state=RecurrentState(layers))
    tensors = adapter.to_tensors()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata=file_metadata(tensors, adapter.manifest, FORMAT))
    assert read_adapter_file(str(path)).state.layers[0]["S"].dtype == dtype


def test_manifest_is_plain_json(read_adapter: Adapter) -> None:
    assert json.loads(json.dumps(read_adapter.manifest, allow_nan=False)) == read_adapter.manifest
    assert read_adapter.manifest["method"] == "read"
    assert read_adapter.manifest["num_tokens"] == 200
    assert read_adapter.manifest["usage"]["tokens_forward"] == 200
