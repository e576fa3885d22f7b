"""What a REFINE step costs, against one reading and against the published loop."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_ORACLE = Path(__file__).resolve().parents[1] / "tests" / "adapters" / "oracle.py"


def load_oracle() -> ModuleType:
    """The literal loop of the tests. Raises FileNotFoundError outside a source tree."""
    if not _ORACLE.is_file():
        raise FileNotFoundError(f"{_ORACLE} is missing: compare with the literal loop in a clone")
    spec = importlib.util.spec_from_file_location("imprint_step_oracle", _ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
