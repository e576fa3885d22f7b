"""The step benchmark runs, says what it promises, and its gradients agree with the oracle's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imprint.adapters import step_benchmark
from imprint.adapters.step_benchmark import load_oracle, run_step_benchmark


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reports_every_ratio(tiny_checkpoint: Path, device: str) -> None:
    said: list[str] = []
    report = run_step_benchmark(
        model=tiny_checkpoint,
        device=device,
        num_tokens=48,
        positions=1,
        rollout_length=2,
        segment_tokens=16,
        repeats=1,
        literal_repeats=1,
        peak_tokens=(64, 128),
        progress=said.append,
    )
    assert json.loads(json.dumps(report)) == report
    assert report["grad_rel_error"] < 1e-4
    for name in ("step_over_reading", "literal_over_trunk", "literal_over_trunk_8"):
        assert report[name] > 0
    assert report["peak_ratio_32k_8k"] > 0
    assert report["study_s"] > 0
    assert report["reading_then_step_4"]["ratio"]["median"] == report["step_over_reading"]
    assert len(said) == 6


def test_the_published_loop_can_be_left_out(tiny_checkpoint: Path) -> None:
    sizes = {"num_tokens": 48, "positions": 2, "rollout_length": 2, "segment_tokens": 16}
    report = run_step_benchmark(
        model=tiny_checkpoint, **sizes, repeats=1, with_loop=False, peak_tokens=(64, 128)
    )
    assert report["step_over_reading"] > 0
    assert not [name for name in report if "literal" in name or "grad" in name]


def test_outside_a_source_tree_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_benchmark, "_ORACLE", Path("/nowhere/oracle.py"))
    with pytest.raises(FileNotFoundError, match="clone"):
        load_oracle()
