"""The compose file: read by docker-compose itself where it is installed, and held to promises."""

from __future__ import annotations

import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from imprint.server.config import Settings
from imprint.server.keys import KeyRing

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy" / "docker-compose.yml"
ENV = ROOT / "deploy" / ".env"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_docker_compose_accepts_it(program: Callable[[str], str], profile: str) -> None:
    command = [program("docker-compose"), "-f", str(COMPOSE), "--profile", profile, "config"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    image = "imprint-gpu" if profile == "gpu" else "imprint"
    assert {image, "prometheus", "grafana"} <= set(services)
    assert services[image]["environment"]["IMPRINT_API_KEYS_FILE"] == "/run/secrets/api_keys"


def test_one_command_starts_one_imprint(compose: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles") for name, service in compose["services"].items()}
    assert profiles == {"imprint": ["cpu"], "imprint-gpu": ["gpu"], "prometheus": None,
                        "grafana": None}  # fmt: skip
    assert "COMPOSE_PROFILES=cpu" in ENV.read_text(encoding="utf-8").splitlines()


def test_containers_hold_little_power(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        user = service["user"].split(":")[0]
        assert user.isdigit(), name
        assert user != "0", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["tmpfs"] == ["/tmp"], name
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert not re.search(r"(PASSWORD|KEYS|SECRET|TOKEN)(?!.*FILE)", str(service["environment"])
                             if "environment" in service else ""), name  # fmt: skip


def test_imprint_has_time_to_drain(compose: dict[str, Any]) -> None:
    for name in ("imprint", "imprint-gpu"):
        grace = compose["services"][name]["stop_grace_period"]
        assert int(grace.removesuffix("s")) > Settings().drain_timeout_s + 10


def test_variables_are_settings(compose: dict[str, Any]) -> None:
    known = {f"IMPRINT_{name.upper()}" for name in Settings.model_fields}
    for service in compose["services"].values():
        ours = {name for name in service.get("environment", {}) if name.startswith("IMPRINT_")}
        assert ours <= known


def test_prometheus_scrapes_the_port_that_the_image_serves(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "imprint")
    port = re.search(r"^EXPOSE (\d+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert port
    assert job["static_configs"][0]["targets"] == [f"imprint:{port[1]}"]
    for name in ("imprint", "imprint-gpu"):
        assert compose["services"][name]["networks"]["default"]["aliases"] == ["imprint"]


def test_what_is_mounted_exists(compose: dict[str, Any]) -> None:
    mounted = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
        if volume.startswith("./")
    ]
    assert len(mounted) == 4
    assert [name for name in mounted if not (COMPOSE.parent / name).exists()] == []
    rules = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    assert [f"./prometheus/{name}" for name in rules["rule_files"] if name] == [mounted[1]]


def test_secrets_are_made_once_and_can_be_read_by_the_server(
    tmp_path: Path, compose: dict[str, Any]
) -> None:
    folder = tmp_path / "secrets"
    command = ["sh", str(ROOT / "deploy" / "make-secrets.sh"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    wanted = {Path(secret["file"]).name for secret in compose["secrets"].values()}
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(first) == wanted
    assert KeyRing.load(folder / "api_keys").names == ["operator"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
