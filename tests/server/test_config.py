"""Every setting is documented, settable and checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from imprint.server.config import BUNDLED_MODEL, Settings, options, unknown_variables


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_setting_says_what_it_does(option) -> None:
    assert option.description.endswith((".", ";")), option.name
    assert option.flag == "--" + option.name.replace("_", "-")
    assert option.env == "IMPRINT_" + option.name.upper()


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_setting_is_read_by_something(option) -> None:
    root = Path(__file__).resolve().parents[2] / "server"
    used = re.compile(rf"(settings|self|_settings)\.{option.name}\b")
    assert any(used.search(path.read_text()) for path in root.rglob("*.py")), option.name


def test_flag_beats_variable_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().port == 8765
    monkeypatch.setenv("IMPRINT_PORT", "9000")
    assert Settings().port == 9000
    assert Settings(port=9001).port == 9001


def test_defaults_are_safe() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert settings.model == BUNDLED_MODEL
    assert settings.served_model_name == "imprint-tiny"


@pytest.mark.parametrize(
    "values",
    [{"port": -1}, {"max_body_bytes": 0}, {"threads": 0}, {"keep_alive_s": 0}, {"prot": 1}],
)
def test_nonsense_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Settings(**values)


def test_kubernetes_service_link_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_PORT", "tcp://10.0.0.1:8765")
    with pytest.raises(ValidationError, match="enableServiceLinks"):
        Settings()


def test_the_api_process_loads_no_torch() -> None:
    code = "import sys, imprint.server.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_misspelled_variables_are_found() -> None:
    names = {"IMPRINT_PORT": "1", "IMPRINT_PROT": "1", "PATH": ""}
    assert unknown_variables(names) == ["IMPRINT_PROT"]


def test_settings_reach_the_pool(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        num_slots=3,
        workers=2,
        max_active_requests=7,
        kernels="reference",
    )
    config = settings.pool_config()
    assert config.kernels == "reference"
    assert config.num_workers == 2
    assert config.worker.num_slots == 3
    assert config.worker.max_waiting_requests == config.max_waiting_requests == 7
    assert config.worker.store == str(tmp_path / "adapters")
