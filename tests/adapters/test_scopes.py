"""What each scope trains: exact gradients, copies that stay, files that go there and back."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imprint.adapters.adapter import FORMAT, Adapter
from imprint.adapters.calls import run_calls
from imprint.adapters.config import RefineConfig
from imprint.adapters.continuing import begins
from imprint.adapters.errors import AdaptationError
from imprint.adapters.exchange import ForeignAdapterError, read_foreign
from imprint.adapters.files import ProgressFolder
from imprint.adapters.imported import read_import
from imprint.adapters.progress import Progress
from imprint.adapters.refine import Refiner
from imprint.adapters.scopes import TrainedStart, fresh
from imprint.adapters.step_benchmark import load_oracle
from imprint.adapters.trunk import trunk_step
from imprint.adapters.verified import to_blob
from imprint.models import (
    DeltaNet,
    FastWeightModel,
    GatedDeltaNetConfig,
    LactConfig,
    RecurrentState,
    build_model,
    weights_hash,
)
from imprint.server.errors import InvalidRequestError
from imprint.server.schemas import parse_method

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
HASH = "a" * 64


class Started:
    """A model that reads from `start` wherever a reading begins from nothing: for the oracle."""

    def __init__(self, model: FastWeightModel, start: RecurrentState) -> None:
        self.model, self.start = model, start
        self.logits, self.device = model.logits, model.device

    def __call__(
        self, tokens_BT: Tensor, state: RecurrentState | None = None, *, delta: None = None
    ) -> tuple[Tensor, RecurrentState]:
        hidden, after = self.model(tokens_BT, self.start if state is None else state)
        return hidden, after


@pytest.fixture(params=["delta_net", "gated_deltanet"])
def model64(request: pytest.FixtureRequest, tiny_model64: DeltaNet) -> FastWeightModel:
    if request.param == "delta_net":
        return tiny_model64
    model = build_model(GatedDeltaNetConfig(**SIZES, num_heads=1, num_v_heads=2, head_dim=16))
    model.reset_parameters(1)
    return model.double().eval().requires_grad_(False)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("branches", ["recall", "mixed"])
def test_the_gradient_of_the_start_is_the_literal_loops(
    model64: FastWeightModel, branches: str, group_size: int
) -> None:
    oracle = load_oracle()
    config = RefineConfig(
        scope="state",
        min_entropy=0.0,
        branches=branches,
        group_size=group_size,
        advantage="grpo",
        positions=4,
        rollout_length=3,
        cue_tokens=4,
        segment_tokens=16,
    )
    tokens_T = torch.randint(257, (60,), generator=torch.Generator().manual_seed(0))
    trained = TrainedStart.fresh(model64)
    with torch.no_grad():
        for value in trained.parameters():
            value.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    for value in trained.parameters():
        value.requires_grad_()
    view = trained.view
    assert view.start is not None
    step = trunk_step(
        model64, tokens_T, config, delta=None, seed=3, step=0, start=view.start
    )  # fmt: skip
    result = run_calls(step)
    mine = _take_grads(trained)
    assert result.rollouts_QNGK is not None
    assert result.advantages_QNG is not None
    listed = [
        oracle.Branch(
            int(position),
            bool(result.recall_N[i]),
            result.rollouts_QNGK[0, i, g].tolist(),
            float(result.advantages_QNG[0, i, g]),
        )
        for i, position in enumerate(result.positions_QN[0])
        for g in range(group_size)
    ]
    settings = oracle.Settings(config.lambda_rl, config.lambda_ntp, 4, "lora", 3)
    started = Started(model64, view.start)
    oracle.accumulate_gradients(started, tokens_T.tolist(), listed, settings, None)
    for got, right in zip(mine, _take_grads(trained), strict=True):
        assert right.norm() > 0
        assert float((got - right).norm() / right.norm()) < 1e-9


def _take_grads(trained: TrainedStart) -> list[Tensor]:
    grads = []
    for parameter in trained.parameters():
        assert parameter.grad is not None
        grads.append(parameter.grad)
        parameter.grad = None
    return grads


def test_a_start_of_zeros_changes_nothing(tiny_model: DeltaNet, document: list[int]) -> None:
    trained = fresh(tiny_model, RefineConfig(scope="state"), seed=0)
    tokens = torch.tensor([document])
    with torch.no_grad():
        right, _ = tiny_model(tokens)
        got, _ = tiny_model(tokens, trained.view.start)
    assert torch.equal(got, right)


@pytest.mark.parametrize("scope", ["query_lora", "lora", "state", "full"])
def test_a_copy_stays_what_it_is_and_a_blend_lies_between(tiny_model: DeltaNet, scope: str) -> None:
    trained = fresh(
        tiny_model,
        RefineConfig(scope=scope, lora_rank=2, lora_targets=("q_proj", "o_proj")),
        seed=0,
    )
    nothing = trained.copy()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    kept, half, none = trained.copy(), trained.scaled(0.5), trained.scaled(0.0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    assert not any(p.requires_grad for p in (*kept.parameters(), *half.parameters()))
    for mine, moved in zip(kept.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(mine + 1, moved.detach())
    tokens = torch.tensor([[5, 6, 7]])

    def said(view: Any) -> Tensor:
        with torch.no_grad():
            return view.model(tokens, view.start, delta=view.ask_delta)[0]

    assert torch.equal(said(none.view), said(nothing.view))
    assert not torch.allclose(said(half.view), said(kept.view), atol=1e-3)
    back = trained.from_tensors(kept.to_tensors("x."), "x.")
    assert torch.equal(said(back.view), said(kept.view))


def test_memory_that_starts_from_weights_has_no_start_to_train(document: list[int]) -> None:
    model = build_model(
        LactConfig(**SIZES, num_attn_heads=4, num_lact_heads=2, lact_chunk_size=16, window_size=16)
    )
    model.reset_parameters(1)
    refiner = Refiner(model, document, RefineConfig(scope="state"))
    with pytest.raises(AdaptationError, match="scope state does not fit LaCT") as error:
        list(refiner.run())
    assert error.value.code == "invalid_method"


# ---- scope full ----------------------------------------------------------------------------------

FULL = RefineConfig(
    scope="full", steps=3, learning_rate=3e-3, positions=3, rollout_length=3, group_size=2,
    cue_tokens=4, segment_tokens=64, probe_places=8, probe_confidence=0,
)  # fmt: skip


def test_every_weight_of_a_copy_is_trained_and_the_model_is_never_written(
    tiny_model: DeltaNet, document: list[int]
) -> None:
    before = weights_hash(tiny_model)
    refiner = Refiner(tiny_model, document, FULL, seed=1)
    list(refiner.run())
    adapter, chosen = refiner.adapter, refiner.chosen
    assert adapter is not None
    assert chosen is not None, adapter.manifest["result"]
    assert weights_hash(tiny_model) == before
    assert not any(p.requires_grad or p.grad is not None for p in tiny_model.parameters())
    assert adapter.weights is not None
    named = dict(tiny_model.named_parameters())
    assert adapter.weights.keys() == named.keys()
    assert all(not torch.equal(weight, named[name]) for name, weight in adapter.weights.items())
    with torch.no_grad():
        _, end = chosen.trained.view.model(torch.tensor([document]))
    for mine, right in zip(adapter.state.tensors(), end.tensors(), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    back = Adapter.from_tensors(adapter.to_tensors(), adapter.manifest)
    assert back.adapted
    assert back.weights is not None
    assert all(torch.equal(back.weights[name], weight) for name, weight in adapter.weights.items())


def test_a_study_of_all_weights_goes_on_where_it_was_ended(
    tiny_model: DeltaNet, document: list[int], tmp_path: Path
) -> None:
    whole = Refiner(tiny_model, document, FULL, seed=1)
    list(whole.run())
    folder = ProgressFolder(tmp_path)
    progress = Progress(folder, "a", "m", lambda outcome: None)
    for quantum in Refiner(tiny_model, document, FULL, seed=1, progress=progress).run():
        if quantum.event is not None and quantum.step == 2:
            break
    refiner = Refiner(tiny_model, document, FULL, seed=1, progress=progress)
    assert [quantum.step for quantum in refiner.run() if quantum.resumed is not None] == [2]
    assert refiner.adapter is not None
    assert whole.adapter is not None
    assert refiner.adapter.manifest == whole.adapter.manifest
    tensors = whole.adapter.to_tensors()
    for name, tensor in refiner.adapter.to_tensors().items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_server_neither_studies_all_weights_nor_takes_them_in(
    adapter: Adapter, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match=r"scope full .* no server keeps") as refusal:
        parse_method({"scope": "full"}, preset="default")
    assert refusal.value.param == "method.scope"
    path = tmp_path / "file"
    config = {**adapter.manifest["config"], "scope": "full"}
    path.write_bytes(to_blob(adapter.to_tensors(), {**adapter.manifest, "config": config}, FORMAT))
    with pytest.raises(ForeignAdapterError, match="no server keeps"):
        read_foreign(path, model_hash=HASH)


def test_types_that_lose_small_steps_are_refused(tiny_model: DeltaNet) -> None:
    model = deepcopy(tiny_model).bfloat16()
    with pytest.raises(AdaptationError, match="needs a model in float32"):
        fresh(model, FULL, seed=0)


# ---- adapters of scope state ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_model: DeltaNet, document: list[int]) -> Adapter:
    config = RefineConfig(
        scope="state", steps=4, learning_rate=1.0, positions=3, rollout_length=3, group_size=2,
        cue_tokens=4, segment_tokens=64, probe_places=8, selection="entropy",
        blend_factors=(1.0,),
    )  # fmt: skip
    refiner = Refiner(tiny_model, document, config, seed=1)
    list(refiner.run())
    assert refiner.adapter is not None
    assert refiner.adapter.adapted, refiner.adapter.manifest["result"]
    refiner.adapter.manifest["model_hash"] = HASH
    return refiner.adapter


def test_it_is_given_away_and_taken_in(
    adapter: Adapter, tiny_model: DeltaNet, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    tensors = adapter.to_tensors()
    path.write_bytes(to_blob(tensors, adapter.manifest, FORMAT))
    read_foreign(path, model_hash=HASH)
    read = read_import(path, tiny_model)
    assert read.adapted
    assert read.nbytes == adapter.nbytes == 2 * adapter.state.nbytes + 12 * len(adapter.tokens_T)
    found = read.to_tensors()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("change", ["gone", "shape", "inf"])
def test_a_start_that_does_not_fit_is_refused(
    adapter: Adapter, tiny_model: DeltaNet, tmp_path: Path, change: str
) -> None:
    tensors, name, path = adapter.to_tensors(), "start.0.S", tmp_path / "file"
    changed = {
        "shape": torch.zeros(3),
        "inf": torch.full_like(tensors[name], float("inf")),
    }.get(change)
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    kept = others if changed is None else {**others, name: changed}
    path.write_bytes(to_blob(kept, adapter.manifest, FORMAT))
    with pytest.raises(AdaptationError, match=name):
        read_import(path, tiny_model)


def test_a_start_without_an_accepted_study_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(to_blob(adapter.to_tensors(), {**adapter.manifest, "method": "read"}, FORMAT))
    with pytest.raises(ForeignAdapterError, match="outcome"):
        read_foreign(path, model_hash=HASH)


def test_nothing_is_read_on_from_it(adapter: Adapter) -> None:
    longer = torch.cat((adapter.tokens_T, torch.tensor([5])))
    assert not begins(adapter, longer)
