"""Checkpoint folders: what is wrong is named, what is right is loaded bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imprint.models import CheckpointError, DeltaNet, load_model, save_model, weights_hash
from imprint.models.config import DeltaNetConfig
from imprint.models.registry import load_config

NAME = "model.layers.1.attn.q_proj.weight"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_loads_frozen_in_eval_mode(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in read(tiny_checkpoint).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert load_model(str(tiny_checkpoint), dtype=torch.float64).dtype == torch.float64


def test_save_and_load_give_the_same_model(tiny_model: DeltaNet, tmp_path: Path) -> None:
    save_model(tiny_model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == tiny_model.config
    assert weights_hash(loaded) == weights_hash(tiny_model)


def test_states_of_another_layout_are_of_another_model(
    tiny_model: DeltaNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_hash(tiny_model)
    monkeypatch.setattr(DeltaNet, "state_layout", "turned")
    assert weights_hash(tiny_model) != before


def test_missing_tensor_is_named(folder: Path) -> None:
    tensors = read(folder)
    del tensors[NAME]
    write(folder, tensors)
    with pytest.raises(CheckpointError, match=rf"missing {NAME} \(32, 32\)"):
        load_model(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    write(folder, {**read(folder), "model.layers.1.attn.D": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.1\.attn\.D"):
        load_model(folder)


def test_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    write(folder, {**read(folder), NAME: torch.zeros(32, 16)})
    with pytest.raises(CheckpointError, match=rf"{NAME} has shape \(32, 16\).*\(32, 32\)"):
        load_model(folder)


def test_many_problems_are_summed_up(folder: Path) -> None:
    write(folder, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(CheckpointError, match=r"\(and \d+ more\)"):
        load_model(folder)


def test_shards_are_joined(folder: Path) -> None:
    tensors = read(folder)
    right = weights_hash(load_model(folder))
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert weights_hash(load_model(folder)) == right
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no b\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"weight_map": ["a"]}'])
def test_broken_shard_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_files_are_loaded_in_the_asked_type(folder: Path, dtype: torch.dtype) -> None:
    write(folder, {name: tensor.to(dtype) for name, tensor in read(folder).items()})
    model = load_model(folder)
    assert model.dtype == torch.float32
    assert torch.equal(model.state_dict()[NAME], read(folder)[NAME].float())
    assert load_model(folder, dtype=dtype).dtype == dtype


def test_save_can_narrow(tiny_model: DeltaNet, tmp_path: Path) -> None:
    save_model(tiny_model, tmp_path, dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in read(tmp_path).values())


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    config = DeltaNetConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_heads=2,
        intermediate_size=8,
        tie_word_embeddings=True,
    )
    model = DeltaNet(config)
    model.reset_parameters(0)
    save_model(model, tmp_path)
    assert "lm_head.weight" not in read(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    tensors = read(tmp_path)
    del tensors["model.embeddings.weight"]
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"missing model\.embeddings\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\xff" * 64])
def test_file_that_is_no_safetensors_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors"):
        load_model(folder)


def test_torn_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_model(folder)


def test_pickled_checkpoints_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors checkpoints are read"):
        load_model(folder)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_unsupported_architecture_is_named(folder: Path) -> None:
    configure(folder, model_type="llama")
    with pytest.raises(CheckpointError, match=r"'llama' is not supported \(supported: .*delta_net"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_heads": 3}, "key_dim 32 is not divisible by num_heads 3"),
        ({"qk_norm": "sum"}, "only qk_norm 'l2'"),
        ({"qk_activation": "relu"}, "'relu'"),
        ({"attn": {"layers": [1]}}, "attn {.*} is not supported; it must be null"),
        ({"attnres_block_size": 2}, "attnres_block_size"),
        ({"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
        ({"num_heads": None}, "num_heads must be an integer, got None"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer, got 2.5"),
        ({"expand_k": "wide"}, "expand_k must be a number, got 'wide'"),
        ({"use_gate": "yes"}, "use_gate must be true or false, got 'yes'"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be an integer or null"),
    ],
)
def test_unusable_settings_are_named(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\udcff"])
def test_broken_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


def test_unknown_keys_are_passed_over(folder: Path) -> None:
    configure(folder, fuse_norm=True, attn=None, transformers_version="5.0")
    load_model(folder)


def test_config_round_trip(tmp_path: Path) -> None:
    config = DeltaNetConfig(hidden_size=64, num_heads=4, use_gate=True, expand_v=2.0)
    config.save(tmp_path)
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("hidden", "width"), [(2048, 5632), (1536, 4096), (64, 256), (128, 512), (512, 1536)]
)
def test_default_mlp_width_is_that_of_the_public_code(hidden: int, width: int) -> None:
    assert DeltaNetConfig(hidden_size=hidden).mlp_dim == width
    assert DeltaNetConfig(hidden_size=hidden, intermediate_size=96).mlp_dim == 96


def test_hash_changes_with_a_single_bit(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    before = weights_hash(model)
    assert before == weights_hash(load_model(tiny_checkpoint))
    bits = model.get_parameter(NAME).view(torch.int32)
    bits[3, 5] ^= 1
    assert weights_hash(model) != before
    bits[3, 5] ^= 1
    assert weights_hash(model) == before
    model.get_parameter(NAME)[0, :2] = model.get_parameter(NAME)[0, :2].flip(0)
    assert weights_hash(model) != before


def test_hash_tells_types_apart(tiny_model: DeltaNet, tiny_model64: DeltaNet) -> None:
    assert weights_hash(tiny_model) != weights_hash(tiny_model64)
