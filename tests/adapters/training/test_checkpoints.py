"""Checkpoints of training: exact, in files of a bounded size, refused by name where damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imprint.adapters.training.checkpoints import (
    SHARD_BYTES,
    Checkpoints,
    OptimizerState,
    RunFolderError,
)
from imprint.models import CheckpointError, FastWeightModel, load_model, weights_hash
from imprint.models.registry import build_model, parse_config
from imprint.models.shards import read_header
from imprint.server.config import BUNDLED_MODEL

PROGRESS = {"step": 7, "num_tokens": 1024, "seconds": 0.1}


def trained(model: FastWeightModel) -> OptimizerState:
    """The optimizer's state after a step on made-up gradients, by name."""
    model.train().requires_grad_(True)
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(names.values(), lr=1 / 3)
    for parameter in names.values():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    state = optimizer.state_dict()
    return {
        "state": {name: state["state"][index] for index, name in enumerate(names)},
        "param_groups": state["param_groups"],
    }


@pytest.fixture
def model() -> FastWeightModel:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}
    model = build_model(parse_config({"model_type": "delta_net", "vocab_size": 300, **shape}))
    model.reset_parameters(0)
    return model


@pytest.fixture
def saved(model: FastWeightModel, tmp_path: Path) -> Checkpoints:
    """A checkpoint whose largest file has 20,000 bytes, or one tensor."""
    checkpoints = Checkpoints(tmp_path, shard_bytes=20_000)
    state = trained(model)
    checkpoints.save(model.config, model.state_dict(), state, PROGRESS, init=BUNDLED_MODEL)
    return checkpoints


def test_what_was_saved_comes_back_exactly(model: FastWeightModel, tmp_path: Path) -> None:
    state = trained(model)
    checkpoints = Checkpoints(tmp_path, shard_bytes=20_000)
    assert checkpoints.progress() is None
    checkpoints.save(model.config, model.state_dict(), state, PROGRESS, init=BUNDLED_MODEL)
    again = Checkpoints(tmp_path)
    again.recover()
    assert again.progress() == PROGRESS
    found = again.optimizer_state()
    groups = [{**group, "betas": list(group["betas"])} for group in state["param_groups"]]
    assert found["param_groups"] == groups
    assert set(found["state"]) == set(state["state"])
    for name, fields in state["state"].items():
        assert set(found["state"][name]) == set(fields)
        for field, tensor in fields.items():
            assert torch.equal(found["state"][name][field], tensor), (name, field)
    assert weights_hash(load_model(again.folder)) == weights_hash(model)


def test_no_file_is_larger_than_asked_unless_a_tensor_is(saved: Checkpoints) -> None:
    weights = sorted(saved.folder.glob("*.safetensors"))
    moments = sorted((saved.folder / "optimizer").iterdir())
    assert min(len(weights), len(moments)) > 2
    for file in (*weights, *moments):
        assert file.stat().st_size <= 20_000 or len(read_header(file)) == 1, file


def test_the_bundled_model_trains_in_files_under_16_mib(tmp_path: Path) -> None:
    model = load_model(BUNDLED_MODEL)
    checkpoints = Checkpoints(tmp_path)
    state = trained(model)
    checkpoints.save(model.config, model.state_dict(), state, PROGRESS, init=BUNDLED_MODEL)
    sizes = [f.stat().st_size for f in checkpoints.folder.rglob("*") if f.is_file()]
    assert max(sizes) < SHARD_BYTES
    assert sum(sizes) > 3 * SHARD_BYTES


@pytest.mark.parametrize(
    "pattern", ["model-00002*", "optimizer/optimizer-00001*", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes of"),
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"),
            "is not what was written",
        ),
    ],
    ids=["missing", "torn", "changed"],
)
def test_a_damaged_file_is_refused_by_name(
    saved: Checkpoints, pattern: str, damage: Callable[[Path], object], message: str
) -> None:
    (file,) = saved.folder.glob(pattern)
    damage(file)
    with pytest.raises(RunFolderError, match=f"{file.name} .*{message}"):
        saved.recover()


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3, "num_tokens": 9}'])
def test_progress_that_is_torn_or_of_another_version_is_refused(
    saved: Checkpoints, text: str
) -> None:
    (saved.folder / "progress.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"progress\.json is torn or of another version"):
        saved.recover()


def test_a_checkpoint_without_its_progress_is_not_begun_anew(saved: Checkpoints) -> None:
    (saved.folder / "progress.json").unlink()
    with pytest.raises(RunFolderError, match=r"progress\.json is missing"):
        saved.recover()


def test_a_server_needs_the_model_alone_and_refuses_a_torn_shard_of_it(saved: Checkpoints) -> None:
    shutil.rmtree(saved.folder / "optimizer")
    load_model(saved.folder)
    shard = saved.folder / next(saved.folder.glob("model-00002*")).name
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} is not a whole safetensors file"):
        load_model(saved.folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"holds no {shard.name}"):
        load_model(saved.folder)


def test_the_older_checkpoint_stands_while_a_new_one_is_torn(
    saved: Checkpoints, model: FastWeightModel, tmp_path: Path
) -> None:
    saved.folder.rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new" / "config.json").write_text("{")
    saved.recover()
    assert saved.progress() == PROGRESS
    assert not list(tmp_path.glob("checkpoint.*"))
