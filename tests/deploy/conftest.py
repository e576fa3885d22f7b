"""A real server for one module of tests, and programs that may not be installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
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


@contextmanager
def live_server(folder: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """The address of an `imprint serve` that is ready; its log is `folder`/log."""
    log = folder / "log"
    command = [sys.executable, "-m", "imprint.server.cli", "serve", "--port", "0"]
    command += ["--data-dir", str(folder / "data"), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        pattern = re.compile(r"http://127\.0\.0\.1:\d+")
        wait_for(lambda: pattern.search(log.read_text()) or process.poll(), "an address")
        assert process.poll() is None, log.read_text()
        found = pattern.search(log.read_text())
        assert found
        with httpx.Client(base_url=found[0], timeout=10) as http:
            wait_for(lambda: http.get("/health/ready").is_success, "a ready worker")
        yield found[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="session", name="program")
def program_fixture() -> Callable[[str], str]:
    return program


@pytest.fixture(scope="session", name="live_server")
def live_server_fixture() -> Callable[..., object]:
    return live_server


@pytest.fixture(scope="session", name="wait_for")
def wait_for_fixture() -> Callable[..., None]:
    return wait_for
