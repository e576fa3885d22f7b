"""Studies that are ended at any moment and go on in another process: the same adapter, bit for bit.

A process is stood in for by a new `Refiner` and a new `Progress` over the same folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imprint.adapters.adapter import FORMAT as ADAPTER_FORMAT
from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.config_fields import BRANCHES
from imprint.adapters.files import FileFolder, ProgressFolder
from imprint.adapters.progress import FORMAT, Progress
from imprint.adapters.refine import Refiner
from imprint.adapters.verified import file_metadata, read_verified, to_blob
from imprint.models import DeltaNet
from imprint.models.architecture import FastWeightModel
from imprint.models.config import GatedDeltaNetConfig, ModelConfig
from imprint.models.lact_config import LactConfig
from imprint.models.registry import build_model

NEUTRAL = list(range(60, 90))
SCOPES = ("lora", "query_lora", "state")  # for full, see test_scopes.py
SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
ARCHITECTURES: dict[str, ModelConfig] = {
    "gated_deltanet": GatedDeltaNetConfig(**SIZES, num_heads=1, num_v_heads=2, head_dim=16),
    "lact_swiglu": LactConfig(
        **SIZES, num_attn_heads=4, num_lact_heads=2, lact_chunk_size=16, window_size=16
    ),
}


class Bench:
    """One study of one document, begun as often as a test wants."""

    def __init__(
        self, folder: Path, model: FastWeightModel, document: list[int], config: RefineConfig
    ) -> None:
        self.folder = ProgressFolder(folder)
        self.model, self.document, self.config = model, document, config
        self.counts: list[str] = []
        self.model_hash = "m"
        self.seed = 7

    def refiner(self, *, kept: bool = True) -> Refiner:
        progress = Progress(self.folder, "a", self.model_hash, self.counts.append)
        return Refiner(
            self.model,
            self.document,
            self.config,
            seed=self.seed,
            neutral=NEUTRAL,
            progress=progress if kept else None,
        )

    def whole(self) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """The adapter and the events, without any interruption and without a checkpoint."""
        refiner = self.refiner(kept=False)
        events = [quantum.event for quantum in refiner.run() if quantum.event is not None]
        return content(refiner.adapter), events

    def run_until_step(self, step: int, *, extra: int = 0) -> None:
        """End a study `extra` quanta after the event of `step`."""
        quanta = self.refiner().run()
        for quantum in quanta:
            if quantum.event is not None and quantum.step == step:
                for _ in range(extra):
                    next(quanta, None)
                break
        quanta.close()  # type: ignore[attr-defined]


def content(adapter: Adapter | None) -> dict[str, str]:
    """What the adapter's file says, with the checksum over every bit of it."""
    assert adapter is not None
    return file_metadata(adapter.to_tensors(), adapter.manifest, ADAPTER_FORMAT)


def interrupted(
    bench: Bench, *, extra: int
) -> tuple[dict[str, str], list[dict[str, Any]], list[int]]:
    """Run on and on, each time until `extra` quanta after the next step's event.

    The adapter, every event in order, and after which steps the study went on.
    """
    events: list[dict[str, Any]] = []
    resumed_at: list[int] = []
    for _ in range(bench.config.steps + 2):
        refiner = bench.refiner()
        quanta = refiner.run()
        left: int | None = None
        for quantum in quanta:
            if quantum.resumed is not None:
                assert quantum.resumed == events[: quantum.step] == events
                resumed_at.append(quantum.step)
            if quantum.event is not None:
                events.append(quantum.event)
                left = extra
            elif left is not None:
                left -= 1
            if left == 0:
                break
        quanta.close()  # type: ignore[attr-defined]
        if refiner.adapter is not None:
            return content(refiner.adapter), events, resumed_at
    raise AssertionError("the study does not get on")


@pytest.fixture
def bench(
    tmp_path: Path, tiny_model: DeltaNet, document: list[int], small: RefineConfig
) -> Callable[..., Bench]:
    def make(model: FastWeightModel = tiny_model, **changes: Any) -> Bench:
        return Bench(tmp_path, model, document, small.replace(**changes))

    return make


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("scope", SCOPES)
def test_ended_after_every_step_it_leaves_the_same_adapter(
    bench: Callable[..., Bench], scope: str, branches: str, extra: int
) -> None:
    study = bench(scope=scope, branches=branches)
    right, events = study.whole()
    got, told, resumed_at = interrupted(study, extra=extra)
    assert got == right
    assert told == events
    assert resumed_at == [1, 2, 3]
    assert study.counts == [*["written"] * 2, *["resumed", "written"] * 2, "resumed"]


@pytest.mark.parametrize("lambda_rl", [0.4, 0.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_writing_strengths_are_kept(
    bench: Callable[..., Bench], scope: str, lambda_rl: float
) -> None:
    study = bench(scope=scope, selection="write", lambda_rl=lambda_rl)
    right, events = study.whole()
    got, told, resumed_at = interrupted(study, extra=0)
    assert got == right
    assert told == events
    assert resumed_at == [1, 2, 3]


@pytest.mark.parametrize(("preset", "steps"), [("default", 3), ("fast", 3), ("paper", 1)])
def test_every_preset_goes_on(
    tmp_path: Path, tiny_model: DeltaNet, document: list[int], preset: str, steps: int
) -> None:
    config = RefineConfig.preset(preset, segment_tokens=64, steps=steps)
    study = Bench(tmp_path, tiny_model, document, config)
    right, events = study.whole()
    got, told, _ = interrupted(study, extra=0)
    assert got == right
    assert told == events


@pytest.mark.parametrize(
    ("name", "scope"),
    [(name, scope) for name in ARCHITECTURES for scope in SCOPES if scope != "state"]
    + [("gated_deltanet", "state")],
)
def test_every_architecture_goes_on(bench: Callable[..., Bench], name: str, scope: str) -> None:
    model = build_model(ARCHITECTURES[name])
    model.reset_parameters(1)
    study = bench(model.eval().requires_grad_(False), scope=scope, branches="mixed", steps=2)
    right, events = study.whole()
    got, told, _ = interrupted(study, extra=0)
    assert got == right
    assert told == events


@pytest.mark.parametrize("scope", SCOPES)
def test_early_stopping_remembers_its_probes(bench: Callable[..., Bench], scope: str) -> None:
    # a step this small cannot move the probe, so every probe after the first ties
    study = bench(scope=scope, steps=50, learning_rate=0.0, patience=3)
    right, events = study.whole()
    got, told, _ = interrupted(study, extra=0)
    assert got == right
    assert told == events
    assert len(events) < 10


def test_one_rollout_groups_weight_decay_and_a_best_step_in_the_middle(
    bench: Callable[..., Bench],
) -> None:
    study = bench(
        scope="lora", group_size=1, weight_decay=0.1, learning_rate=0.3, steps=5, patience=5
    )
    right, _ = study.whole()
    assert interrupted(study, extra=0)[0] == right


def test_a_read_document_is_not_read_again(bench: Callable[..., Bench]) -> None:
    study = bench()
    study.run_until_step(1)
    study.folder.steps.delete("a")  # as if it had been ended before its first step
    phases = [quantum.phase for quantum in study.refiner().run()]
    assert "read" not in phases
    assert phases.count("step") == 3
    continuing = bench(branches="continue")
    continuing.folder.delete("a")
    continuing.run_until_step(1)
    phases = [quantum.phase for quantum in continuing.refiner().run()]
    assert phases[:5] == ["resume", *["read"] * 4]  # its branches leave from inside the document


def refusals(study: Bench, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Run to the end; why checkpoints were refused."""
    caplog.clear()
    study.counts.clear()
    right, events = study.whole()
    refiner = study.refiner()
    with caplog.at_level(logging.WARNING):
        quanta = list(refiner.run())
    assert [quantum.event for quantum in quanta if quantum.event is not None] == events
    assert not [quantum for quantum in quanta if quantum.resumed is not None]
    assert content(refiner.adapter) == right
    assert study.counts.count("refused") == len(caplog.messages)
    assert "resumed" not in study.counts
    return caplog.messages


@pytest.mark.parametrize("part", ["begun", "steps"])
@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused_by_name(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, part: str, damage: str
) -> None:
    study = bench(steps=2)
    study.run_until_step(1)
    folder: FileFolder = getattr(study.folder, part)
    path = folder.path("a")
    whole = path.read_bytes()
    tensors, manifest = read_verified(path, FORMAT)
    path.write_bytes(
        {
            "torn": whole[:-7],
            "flipped": whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:],
            "foreign": to_blob(tensors, manifest, "imprint-progress-0"),
            "empty": b"",
        }[damage]
    )
    (message,) = refusals(study, caplog)
    assert str(path) in message
    assert "starts over" in message


def test_half_a_checkpoint_is_refused_by_name(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    study = bench(steps=2)
    study.run_until_step(1)
    study.folder.begun.delete("a")
    (message,) = refusals(study, caplog)
    assert str(study.folder.begun.path("a")) in message


@pytest.mark.parametrize(
    ("change", "name"),
    [("model", "model"), ("seed", "seed"), ("document", "document"), ("method", "method")],
)
def test_the_checkpoint_of_another_study_is_refused_by_name(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, change: str, name: str
) -> None:
    study = bench(steps=2)
    study.run_until_step(1)
    if change == "model":
        study.model_hash = "another"
    elif change == "seed":
        study.seed += 1
    elif change == "document":
        study.document = study.document[1:]
    else:
        study.config = study.config.replace(learning_rate=2e-2)
    (message,) = refusals(study, caplog)
    assert f"is of a study with another {name}" in message
    assert str(study.folder.begun.path("a")) in message


def test_segments_stay_as_they_were_but_never_grow(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    study = bench(scope="lora", segment_tokens=32, steps=2)
    right, _ = study.whole()
    study.run_until_step(1)
    study.config = study.config.replace(segment_tokens=64)  # it ran out of memory, then died
    refiner = study.refiner()
    list(refiner.run())
    assert content(refiner.adapter) == right
    study.config = study.config.replace(segment_tokens=16)
    (message,) = refusals(study, caplog)
    assert "in segments of 32 tokens, more than the 16 of now" in message


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(
    bench: Callable[..., Bench],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = bench(steps=2)
    right, _ = study.whole()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("imprint.adapters.files.os.replace", full)
    refiner = study.refiner()
    list(refiner.run())
    assert content(refiner.adapter) == right
    assert study.counts == ["unwritten"] * 3
    assert len(caplog.messages) == 3
    assert "is not written: no space left on device" in caplog.messages[0]
    assert study.folder.ids() == []
    assert not list(study.folder.begun.root.parent.rglob("*.partial"))


def test_a_checkpoint_is_small_and_deleted_whole(bench: Callable[..., Bench]) -> None:
    study = bench(steps=4)
    study.run_until_step(1)
    first = study.folder.steps.nbytes()
    study.run_until_step(3)
    delta_bytes = 4 * sum(
        study.config.lora_rank * sum(widths)
        for name, widths in study.model.lora_targets().items()
        if name.endswith(study.config.lora_targets)
    )
    # the delta, two moments of it and the best one; names and numbers beside
    assert first < study.folder.steps.nbytes() < 4 * delta_bytes + 20_000
    assert study.folder.ids() == ["a"]
    study.folder.delete("a")
    assert study.folder.ids() == []
    study.folder.delete("a")


def test_what_is_kept_holds_no_text(bench: Callable[..., Bench]) -> None:
    study = bench(steps=2)
    study.run_until_step(1)
    for folder in (study.folder.begun, study.folder.steps):
        tensors, manifest = read_verified(folder.path("a"), FORMAT)
        assert not any(t.dtype in (torch.int32, torch.int64) for t in tensors.values())
        assert len(json.dumps(manifest)) < 5000
