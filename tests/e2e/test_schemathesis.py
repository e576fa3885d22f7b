"""schemathesis against a live server: no 5xx, and no answer that the OpenAPI document lacks.

Seeded and bounded, so that it says the same each time. The server is a real one with a real
worker on a random tiny model; schemathesis runs as its own program.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
)


@pytest.mark.timeout(400)
def test_no_crash_and_no_undocumented_answer(keyed_live: Any, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"]
    options += ["--seed", "1", "--generation-deterministic", "--max-examples", "3"]
    options += ["--suppress-health-check", "all"]
    options += ["--header", f"Authorization: Bearer {keyed_live.key}", "--request-timeout", "20"]
    result = subprocess.run(
        [str(program), "run", f"{keyed_live.url}/openapi.json", *options, "--no-color"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=380,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
