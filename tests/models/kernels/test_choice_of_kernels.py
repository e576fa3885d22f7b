"""Who computes: the variable, the device and what imports decide, with messages to act on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from imprint.models import kernels
from imprint.models.errors import KernelError
from imprint.models.kernels import triton_version, uses_triton, version_numbers

CPU = torch.device("cpu")


def decide(monkeypatch: pytest.MonkeyPatch, wanted: str | None, device: torch.device = CPU) -> bool:
    """A first decision, as a process with this variable makes it."""
    if wanted is None:
        monkeypatch.delenv("IMPRINT_KERNELS", raising=False)
    else:
        monkeypatch.setenv("IMPRINT_KERNELS", wanted)
    return uses_triton.__wrapped__(device)


@pytest.mark.parametrize("wanted", [None, "auto", "reference"])
@pytest.mark.parametrize("interpreter", ["0", "1"])
def test_a_cpu_takes_plain_torch(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, interpreter: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    assert decide(monkeypatch, wanted) is False


def test_a_bad_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "IMPRINT_KERNELS must be one of auto, reference, triton, got 'fast'"
    with pytest.raises(KernelError, match=expected):
        decide(monkeypatch, "fast")


@pytest.mark.usefixtures("interpreter")
def test_the_interpreter_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decide(monkeypatch, "triton") is True
    assert decide(monkeypatch, "triton", torch.device("meta")) is False
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(KernelError, match="Triton has no cpu backend; with TRITON_INTERPRET=1"):
        decide(monkeypatch, "triton")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"triton does not import; install it with: pip install 'imprint\[gpu\]'"),
        ((3, 1, 0), "Triton 3.1.0 is too old; 3.2 or newer is needed"),
    ],
)
def test_a_missing_or_old_triton_is_named(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] | None, message: str
) -> None:
    monkeypatch.setattr(kernels, "triton_version", lambda: version)
    with pytest.raises(KernelError, match=f"IMPRINT_KERNELS=triton cannot be followed: {message}"):
        decide(monkeypatch, "triton")


def test_an_interpreter_that_numpy_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "triton_version", lambda: (3, 6, 0))
    monkeypatch.setattr("numpy.__version__", "2.4.1")
    with pytest.raises(KernelError, match=r"Triton 3.6.0 does not work with NumPy 2.4.1; take"):
        decide(monkeypatch, "triton")


@pytest.mark.parametrize(
    ("interpreter", "hip", "capability", "failure", "message"),
    [
        ("1", None, (9, 0), None, "TRITON_INTERPRET is set, so kernels would run on the host"),
        ("0", "6.2", (9, 0), None, "AMD GPUs are not tested"),
        ("0", None, (7, 5), None, "compute capability 7.5 is too old; 8.0 is needed"),
        ("0", None, (10, 0), None, "compute capability 10.0 is not tested"),
        ("0", None, (9, 0), "the self-check failed", "the self-check failed"),
        ("0", None, (9, 0), None, None),
    ],
)
def test_a_gpu_that_triton_cannot_serve_is_named(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    interpreter: str,
    hip: str | None,
    capability: tuple[int, int],
    failure: str | None,
    message: str | None,
) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.setattr(kernels, "triton_version", lambda: (3, 7, 1))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("imprint.models.kernels.self_check.failed_check", lambda device: failure)
    assert decide(monkeypatch, "reference", gpu) is False
    if message is None:
        assert decide(monkeypatch, "triton", gpu) is decide(monkeypatch, "auto", gpu) is True
        return
    with pytest.raises(KernelError, match=message):
        decide(monkeypatch, "triton", gpu)
    with caplog.at_level(logging.WARNING):
        assert decide(monkeypatch, "auto", gpu) is False
    assert f"kernels on cuda:0 run in plain torch, which is slower: {message}" in caplog.text


def test_version_numbers() -> None:
    assert version_numbers("3.9.0+git12ab") == (3, 9, 0)
    assert version_numbers("2.13") == (2, 13)
    assert version_numbers("unknown") == ()
    assert (3, 7) < (3, 7, 1) < version_numbers("3.10.0")


@pytest.mark.usefixtures("interpreter")
def test_the_installed_triton_is_known() -> None:
    version = triton_version()
    assert version is not None
    assert version >= (3, 2)


def test_models_load_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; "
        "import imprint.models.registry, imprint.models.deltanet, imprint.models.generate; "
        "from imprint.models.kernels import uses_triton; print(uses_triton(torch.device('cpu')))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "IMPRINT_KERNELS"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environ
    )
    assert result.stdout == "False\n", result.stderr
