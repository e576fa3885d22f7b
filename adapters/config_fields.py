"""What the single fields of a `RefineConfig` may hold: choices, ranges, and the check of one value.

Limit: one field at a time; what fields mean together is `config.py`. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any, Final

from imprint.adapters.errors import ConfigError

SELECTIONS: Final = ("entropy", "uniform", "argmax", "argmin", "write")
BRANCHES: Final = ("continue", "recall", "mixed")
REWARDS: Final = ("exact", "cosine", "hybrid", "expected_exact", "ngram", "edit", "semantic")
ADVANTAGES: Final = ("grpo", "rloo", "dr_grpo")
SCOPES: Final = ("lora", "query_lora", "state", "full")

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "selection": SELECTIONS,
    "branches": BRANCHES,
    "reward": REWARDS,
    "advantage": ADVANTAGES,
    "scope": SCOPES,
}
# field -> (smallest, largest) accepted value; the largest ones bound what a request can cost
RANGES: Final[dict[str, tuple[float, float]]] = {
    "steps": (0, 1000),
    "positions": (1, 1024),
    "rollout_length": (1, 256),
    "group_size": (1, 256),
    "selection_temperature": (1e-3, 1e3),
    "smoothing": (0, 255),
    "margin_tokens": (0, 4096),
    "recall_fraction": (0.0, 1.0),
    "cue_tokens": (1, 256),
    "lambda_rl": (0.0, 1e3),
    "lambda_ntp": (0.0, 1e3),
    "min_entropy": (0.0, 20.0),
    "learning_rate": (0.0, 10.0),
    "trial_steps": (1, 1000),
    "weight_decay": (0.0, 10.0),
    "grad_clip": (1e-6, 1e6),
    "clip_low": (0.0, 1.0),
    "clip_high": (0.0, 10.0),
    "dual_clip": (1.0, 1e3),
    "lora_rank": (1, 256),
    "segment_tokens": (16, 65536),
    "temperature": (1e-2, 10.0),
    "write_gamma": (0.0, 1e3),
    "held_steps": (0, 1000),
    "focus_gamma": (0.0, 1e3),
    "focus_window": (1, 1024),
    "focus_spread": (0.0, 1.0),
    "focus_passages": (0, 64),
    "focus_passage_tokens": (8, 1024),
    "focus_repeat": (0.0, 1.0),
    "focus_memory": (0.0, 1.0),
    "focus_draft_tokens": (0, 512),
    "focus_draft_grounding": (0.0, 100.0),
    "patience": (1, 1000),
    "probe_places": (1, 256),
    "probe_margin": (0.0, 100.0),
    "probe_confidence": (0.0, 10.0),
    "neutral_margin": (0.0, 100.0),
}


def names_of(names: Any) -> str:
    """Names in alphabetical order, as a message lists them."""
    return ", ".join(sorted(names))


def check_field(name: str, value: Any, default: Any) -> Any:
    """The value in the type of its field's default.

    Raises ConfigError, with the field's name, for a value of another kind or out of range.
    """
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            choices = names_of(_CHOICES[name])
            raise ConfigError(name, f"{name} must be one of {choices}, got {value!r}")
        return value
    if isinstance(default, tuple):
        return _checked_tuple(name, value)
    number = _checked_number(name, value, integer=isinstance(default, int))
    low, high = RANGES[name]
    if not low <= number <= high:
        raise ConfigError(name, f"{name} must be between {low} and {high}, got {value!r}")
    return number


def _checked_number(name: str, value: Any, *, integer: bool) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = "an integer" if integer else "a number"
        raise ConfigError(name, f"{name} must be {kind}, got {value!r}")
    if isinstance(value, int) and value.bit_length() > 64:  # maybe more than a float can hold
        raise ConfigError(name, f"{name} is too large a number")
    if integer:
        if value != int(value) if math.isfinite(value) else True:
            raise ConfigError(name, f"{name} must be an integer, got {value!r}")
        return int(value)
    if not math.isfinite(value):
        raise ConfigError(name, f"{name} must be finite, got {value!r}")
    return float(value)


def _checked_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(name, f"{name} must be a list, got {value!r}")
    if len(value) > 64:
        raise ConfigError(name, f"{name} must have at most 64 entries, got {len(value)}")
    if name == "lora_targets":
        for entry in value:
            if not isinstance(entry, str) or not entry:
                raise ConfigError(name, f"{name} must hold names, got {entry!r}")
        return tuple(value)
    if name == "betas" and len(value) != 2:
        raise ConfigError(name, f"betas must be two numbers, got {value!r}")
    return tuple(float(_checked_number(name, entry, integer=False)) for entry in value)
