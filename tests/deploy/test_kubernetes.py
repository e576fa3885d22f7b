"""The manifests: checked against Kubernetes' own schemas, and held to what the server needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from imprint.server.config import Settings
from imprint.server.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.35")
OWN_KINDS = {"Kustomization", "ServiceMonitor", "PrometheusRule"}
"""Of kustomize and of the Prometheus operator: not among Kubernetes' schemas."""


def load(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


MANIFESTS = [(path, manifest) for path in sorted(FOLDER.glob("*.yaml")) for manifest in load(path)]


def kind(name: str) -> dict[str, Any]:
    (found,) = (manifest for _, manifest in MANIFESTS if manifest["kind"] == name)
    return found


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = kind("StatefulSet")["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "manifest",
    [manifest for _, manifest in MANIFESTS if manifest["kind"] not in OWN_KINDS],
    ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}",
)
def test_manifests_follow_the_schemas(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_every_manifest_is_applied() -> None:
    resources = kind("Kustomization")["resources"]
    files = {path.name for path, _ in MANIFESTS} - {"kustomization.yaml"}
    assert set(resources) == files


def test_probes_ask_routes_that_exist(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    paths = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live",
    }  # fmt: skip
    startup = container["startupProbe"]
    allowed_s = startup["periodSeconds"] * startup["failureThreshold"]
    assert allowed_s > Settings().startup_timeout_s


def test_a_pod_has_time_to_drain(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause_s + Settings().drain_timeout_s + 15


def test_pods_hold_little_power(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # IMPRINT_PORT=tcp://... is no port
    assert pod["securityContext"]["runAsNonRoot"] is True
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/var/lib/imprint", "/tmp", "/etc/imprint"}


def test_settings_are_settings(pod: dict[str, Any]) -> None:
    names = {variable["name"] for variable in pod["containers"][0]["env"]}
    assert names <= {f"IMPRINT_{name.upper()}" for name in Settings.model_fields}


def test_each_pod_has_a_volume_of_its_own() -> None:
    (claim,) = kind("StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_autoscaler_follows_a_metric_of_ours() -> None:
    scaler = kind("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == kind("StatefulSet")["metadata"]["name"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name.removeprefix("imprint_") in Metrics().declared
    assert name.endswith("_waiting")


def test_the_monitor_finds_the_pods_once() -> None:
    wanted = kind("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    services = [manifest for _, manifest in MANIFESTS if manifest["kind"] == "Service"]
    found = [
        service["metadata"]["name"]
        for service in services
        if wanted.items() <= service["metadata"].get("labels", {}).items()
    ]
    assert found == ["imprint-pods"]
    (endpoint,) = kind("ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in services[1]["spec"]["ports"]}


def test_alerts_are_those_of_prometheus() -> None:
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"))
    assert kind("PrometheusRule")["spec"]["groups"] == alerts["groups"]
