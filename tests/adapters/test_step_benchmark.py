"""The step benchmark runs, says what it promises, and its gradients agree with the oracle's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imprint.adapters import step_benchmark
from imprint.adapters.step_benchmark import load_oracle, run_step_benchmark


def test_reports_every_ratio(tiny_checkpoint: Path) -> None:
    said: list[str] = []
    report = run_step_benchmark(
        model=tiny_checkpoint,
        num_tokens=48,
        positions=2,
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
    assert report["reading_then_step_4"]["ratio"]["median"] == report["step_over_reading"]
    assert len(said) == 5


def test_outside_a_source_tree_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_benchmark, "_ORACLE", Path("/nowhere/oracle.py"))
    with pytest.raises(FileNotFoundError, match="clone"):
        load_oracle()
