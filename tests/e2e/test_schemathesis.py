"""schemathesis against a live server: no 5xx, and no answer that the OpenAPI document lacks.

Seeded and bounded, so that it says the same each time. The server is a real one with a real
worker on a random tiny model; schemathesis runs as its own program.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow
KEY = "sk-tester-0123456789"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
)


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    keys, log = folder / "keys", folder / "log"
    keys.write_text(f"tester:{KEY}\n")
    command = [sys.executable, "-m", "imprint.server.cli", "serve", "--port", "0"]
    command += ["--model", str(tiny_checkpoint), "--data-dir", str(folder / "data")]
    command += ["--api-keys-file", str(keys), "--drain-timeout-s", "0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 150
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        while httpx.get(f"{found[0]}/health/ready", verify=False).status_code != 200:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.timeout(400)
def test_no_crash_and_no_undocumented_answer(url: str, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"]
    options += ["--seed", "1", "--generation-deterministic", "--max-examples", "3"]
    options += ["--suppress-health-check", "all"]
    options += ["--header", f"Authorization: Bearer {KEY}", "--request-timeout", "20"]
    result = subprocess.run(
        [str(program), "run", f"{url}/openapi.json", *options, "--no-color"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=380,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
