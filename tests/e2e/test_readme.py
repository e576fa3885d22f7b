"""The README's question, pasted as it stands, against a server started as `make serve` starts it.

Uses the bundled model and one free port. Limit: needs bash and curl, as the README does.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWERS = ["7308452", "5192687", "8463015"]
READY_S = 30.0

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=2, verify=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A server on the bundled model; it must be ready in time and end with status 0."""
    port = free_port()
    environment = os.environ | {"IMPRINT_PORT": str(port), "IMPRINT_DATA_DIR": str(tmp_path)}
    command = [str(Path(sys.executable).with_name("imprint")), "serve"]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        deadline = time.monotonic() + READY_S
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, f"not ready after {READY_S} s"
            time.sleep(0.2)
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=45) == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="the README's example uses curl")
def test_the_question_of_the_readme_is_answered(port: int) -> None:
    (block,) = re.findall(r"```sh\n(python3 -c .*?)```", README, re.DOTALL)
    assert "8765" in block
    result = subprocess.run(
        ["bash", "-c", block.replace("8765", str(port))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    reply: dict[str, Any] = json.loads(result.stdout)
    # a unit may follow the number: "8463015 grams"
    assert [item["answer"].split()[0].rstrip(".") for item in reply["answers"]] == ANSWERS
    for item in reply["answers"]:
        focus = item["focus"]
        assert focus["steps"] > 0
        assert set(focus["drafts"]) == {"focus", "passages", "document"}
        # the model knows what it says, and that stands in the text
        assert focus["drafts"][focus["way"]]["confidence"] > -1.0
        assert focus["drafts"][focus["way"]]["grounding"] > 2
        # these numbers are easy to recall: it may well do as well without the study
        assert (focus["way"] != "document") == (focus["passage_tokens"] > 0)
        assert item["adapted"] == (focus["alpha"] is not None)


def test_the_example_is_long_and_its_answers_stand_in_it_once() -> None:
    text = (ROOT / "deploy/examples/harbor.txt").read_text(encoding="utf-8")
    assert len(text.split()) > 700
    assert [text.count(answer) for answer in ANSWERS] == [1, 1, 1]
