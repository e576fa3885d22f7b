"""Random checkpoints in the shape of public ones: exact at full size, loadable at any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imprint.models import CheckpointError, load_model, load_tokenizer, prefill, weights_hash
from imprint.models.checkpoint import save_tensors, skeleton
from imprint.models.fake import write_fake
from imprint.models.public import PUBLIC_MODELS, sized_config
from imprint.models.registry import parse_config
from imprint.models.shards import stored_tensors

SMALL = {"layers": 2, "hidden": 64, "vocab": 300}


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_tensors"),
    [
        ("delta_net-1.3B", 1_365_677_056, 339),
        ("gated_deltanet-1.3B", 1_466_343_808, 435),
        ("lact-760M", 797_625_312, 507),
    ],
)
def test_public_sizes(name: str, num_parameters: int, num_tensors: int) -> None:
    """The counts of the reference implementations' classes for these configurations."""
    model = skeleton(parse_config(PUBLIC_MODELS[name].config))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert len(model.state_dict()) == num_tensors


@pytest.mark.parametrize("name", PUBLIC_MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_small_fake_is_loaded_as_it_was_drawn(name: str, dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "fake"
    num_parameters = write_fake(name, folder, dtype=dtype, shard_bytes=60_000, **SMALL)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    kinds = {tensor.dtype for tensor in stored_tensors(folder).values()}
    assert kinds == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    model = load_model(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    drawn = skeleton(model.config).to(getattr(torch, dtype)).to_empty(device="cpu")
    drawn.reset_parameters(0)
    for key, tensor in drawn.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor.float()), key
    tokens_BT = torch.tensor([load_tokenizer(folder).encode("Where?")])
    logits_BV, _ = prefill(model, tokens_BT)
    assert bool(logits_BV.isfinite().all())


def test_fused_spelling_holds_the_same_numbers(tmp_path: Path) -> None:
    """[gate; up] in one tensor, whole and with a shard of its own, gives the unfused model."""
    write_fake("gated_deltanet-1.3B-fused", tmp_path / "a", **SMALL)
    tensors = load_file(tmp_path / "a" / "model-00001-of-00001.safetensors")
    fused = [name for name in tensors if name.endswith("mlp.gate_proj.weight")]
    assert len(fused) == 2
    assert not any("up_proj" in name for name in tensors)
    for name in fused:
        gate, up = tensors[name].chunk(2)
        tensors[name] = gate.contiguous()
        tensors[name.replace("gate_proj", "up_proj")] = up.contiguous()
    for name in [name for name in tensors if name.endswith("attn.D")]:
        del tensors[name]
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    save_tensors(tensors, tmp_path / "b")
    assert weights_hash(load_model(tmp_path / "a")) == weights_hash(load_model(tmp_path / "b"))


def test_unused_d_must_be_zero(tmp_path: Path) -> None:
    folder = tmp_path / "fake"
    write_fake("gated_deltanet-1.3B", folder, **SMALL)
    load_model(folder)
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.attn.D"
    tensors[name] = -tensors[name]
    save_file(tensors, file)
    load_model(folder)  # minus zero is zero
    tensors[name][0] = 1e-3
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.D is not zero"):
        load_model(folder)


def test_tied_copy_must_be_equal(tmp_path: Path) -> None:
    folder = tmp_path / "fake"
    write_fake("delta_net-1.3B", folder, dtype="float32", **SMALL)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embeddings"):
        load_model(folder)
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    save_file(tensors, file)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        assert model.lm_head.weight is model.model.embeddings.weight


def test_norms_and_rates_stay_wide_under_bfloat16(tmp_path: Path) -> None:
    write_fake("gated_deltanet-1.3B", tmp_path / "fake", **SMALL)
    model = load_model(tmp_path / "fake", dtype=torch.bfloat16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {
        name
        for name, _ in model.named_parameters()
        if "norm" in name or name.endswith(("A_log", "dt_bias"))
    }


@pytest.mark.parametrize(
    ("name", "hidden", "heads"),
    [
        ("delta_net-1.3B", 256, {"num_heads": 2}),
        ("delta_net-1.3B", 48, {"num_heads": 1}),
        ("gated_deltanet-1.3B", 512, {"num_heads": 2, "head_dim": 256}),
        ("gated_deltanet-1.3B", 64, {"num_heads": 1, "head_dim": 64}),
        ("lact-760M", 768, {"num_attn_heads": 12, "num_lact_heads": 2}),
        ("lact-760M", 64, {"num_attn_heads": 1, "num_lact_heads": 1}),
    ],
)
def test_narrow_models_have_fewer_heads(name: str, hidden: int, heads: dict[str, int]) -> None:
    raw = sized_config(PUBLIC_MODELS[name], hidden=hidden)
    assert {key: raw[key] for key in heads} == heads
    skeleton(parse_config(raw))
    assert PUBLIC_MODELS[name].config["hidden_size"] > hidden


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"like": "gpt-5"}, "no public model 'gpt-5' is known here: delta_net-1.3B, "),
        ({"layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden": 200}, "hidden_size 200 is not a multiple of the head width 128"),
        ({"vocab": 258}, "vocab_size must be at least 259, for every byte a token, got 258"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
    ],
)
def test_impossible_fakes(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"like": "delta_net-1.3B", **SMALL, **changes}
    like = str(arguments.pop("like"))
    with pytest.raises(CheckpointError) as raised:
        write_fake(like, tmp_path / "fake", **arguments)  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert not (tmp_path / "fake").exists()


def test_fake_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        write_fake("delta_net-1.3B", tmp_path, **SMALL)
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        write_fake("delta_net-1.3B", tmp_path / "letter.txt", **SMALL)
