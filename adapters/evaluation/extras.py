"""Packages that only some evaluations need: the extra `eval`."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(Exception):
    """An optional package is not installed; the message says how to get it."""


def require(module: str, purpose: str) -> Any:
    """Import an optional module. Raises MissingExtraError naming its package and the purpose."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs {package}, which is not installed: pip install 'imprint[eval]'"
        ) from error
