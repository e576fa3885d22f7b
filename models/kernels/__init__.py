"""The operators of fast-weight models, and which form of them runs where.

Every operator has a form in plain torch that runs anywhere; some have Triton kernels beside it, in
`triton_*.py`, which are imported only where they run. `uses_triton` decides between the two, once
for each device: by `IMPRINT_KERNELS`, by the device, and by what imports. Limit: knows no operator;
float64, which is for comparisons, is always computed in plain torch.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from typing import TYPE_CHECKING

from imprint.models.errors import KernelError

if TYPE_CHECKING:
    import torch

VARIABLE = "IMPRINT_KERNELS"
CHOICES = ("auto", "reference", "triton")

_OLDEST_TRITON = (3, 2)
_OLDEST_CAPABILITY = 8  # Ampere: bfloat16 and TF32 products
_UNTESTED_CAPABILITY = 10  # Blackwell: known miscompilations of delta-rule kernels
# the interpreter of Triton 3.6 makes ints of one-element arrays, which NumPy 2.4 refuses
_INTERPRETS_NEW_NUMPY = (3, 7, 1)

log = logging.getLogger(__name__)


@functools.cache
def uses_triton(device: torch.device) -> bool:
    """Whether operators on `device` run as Triton kernels. The first answer stays.

    `IMPRINT_KERNELS=reference` means never. `auto`, the default, means on a CUDA device where
    Triton works; where it does not, the log says why. `triton` means always: KernelError where it
    cannot, as for any other value of the variable. On a CPU, `triton` needs Triton's interpreter
    (`TRITON_INTERPRET=1`), which is for tests: it is thousands of times slower.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise KernelError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {wanted!r}")
    on_gpu = device.type == "cuda"
    if wanted == "reference" or device.type == "meta" or (wanted == "auto" and not on_gpu):
        return False
    obstacle = find_obstacle(device)
    if obstacle is None:
        return True
    if wanted == "triton":
        raise KernelError(f"{VARIABLE}=triton cannot be followed: {obstacle}")
    log.warning("kernels on %s run in plain torch, which is slower: %s", device, obstacle)
    return False


def find_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, for people; None where they can."""
    obstacle = _obstacle_of_packages()
    if obstacle is None and device.type == "cuda":
        obstacle = _obstacle_of_gpu(device)
    elif obstacle is None and not interpreting():
        obstacle = (
            f"Triton has no {device.type} backend; with TRITON_INTERPRET=1 its interpreter runs "
            "kernels there, slowly, for tests"
        )
    return obstacle


def interpreting() -> bool:
    """Whether Triton would run kernels in its interpreter, on the host, instead of compiling."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def triton_version() -> tuple[int, ...] | None:
    """The version of the Triton that imports, as numbers; None where none does."""
    try:
        import triton
    except ImportError:
        return None
    return version_numbers(triton.__version__)


def version_numbers(version: str) -> tuple[int, ...]:
    """(3, 9, 0) of "3.9.0+git1234": the release, without what follows it."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def _obstacle_of_packages() -> str | None:
    version = triton_version()
    if version is None:
        return "triton does not import; install it with: pip install 'imprint[gpu]'"
    shown = ".".join(map(str, version))
    if version < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {shown} is too old; {oldest} or newer is needed"
    if interpreting() and version < _INTERPRETS_NEW_NUMPY:
        import numpy

        if version_numbers(numpy.__version__) >= (2, 4):
            return (
                f"the interpreter of Triton {shown} does not work with NumPy {numpy.__version__}; "
                "take Triton 3.7.1 or newer, or NumPy older than 2.4"
            )
    return None


def _obstacle_of_gpu(device: torch.device) -> str | None:
    import torch

    if interpreting():
        return "TRITON_INTERPRET is set, so kernels would run on the host; unset it"
    if torch.version.hip is not None:
        return "AMD GPUs are not tested"
    major, minor = torch.cuda.get_device_capability(device)
    if major < _OLDEST_CAPABILITY:
        return f"compute capability {major}.{minor} is too old; {_OLDEST_CAPABILITY}.0 is needed"
    if major >= _UNTESTED_CAPABILITY:
        return (
            f"compute capability {major}.{minor} is not tested, and some Triton versions "
            "miscompile for it"
        )
    from imprint.models.kernels.self_check import failed_check

    return failed_check(device)
