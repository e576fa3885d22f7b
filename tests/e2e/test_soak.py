"""`make soak`, for some seconds: twenty secrets, small caches, and processes that are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_lost_and_no_secret_is_told_elsewhere() -> None:
    command = [sys.executable, str(SOAK), "--seconds", "6", "--crash-every", "3"]
    command += ["--crashes", "3", "--api-crashes", "1", "--documents", "20"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(ran.stdout)
    assert result["broken"] == []
    assert result["base_model_unchanged"]
    assert result["exit_status"] == 0
    assert result["documents"] >= 20
    assert result["crashes"] == {"api": 1, "worker": 2}
    assert result["workers_whose_weights_are_kept"] == 2
    # each is asked twice at least, and secrets that nobody can recall would prove nothing
    assert result["counts"]["answers"] >= 40
    assert result["recall"] >= 0.9
