"""Programs that may not be installed, and deadlines."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_PACKAGES = {"promtool": "prometheus"}
"""Where a program's package has another name."""


def program(name: str) -> str:
    """Its path; without it the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {DEBIAN_PACKAGES.get(name, name)}")
    return path


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Until `condition` is true; a deadline, not a pause."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session", name="program")
def program_fixture() -> Callable[[str], str]:
    return program


@pytest.fixture(scope="session", name="wait_for")
def wait_for_fixture() -> Callable[..., None]:
    return wait_for
