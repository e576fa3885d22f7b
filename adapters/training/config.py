"""What a pre-training run is: read from a TOML file, checked once."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from imprint.models.config import DeltaNetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Until a number of tokens: how long samples are and what they practise, by weight."""

    until_tokens: int
    lengths: dict[int, float]
    kinds: dict[str, float]
    batch_tokens: int = 8192
    """Tokens of one optimiser step; rows times length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """One run. Every field of the TOML file is one of these; unknown ones are refused."""

    model: DeltaNetConfig
    stages: tuple[Stage, ...]
    seed: int = 0
    max_corpus_chars: int = 60_000_000
    """Characters of prose kept in memory."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    autocast: bool = True
    """Compute in bfloat16 where that is safe: slower on CPUs without instructions for it."""
    warmup_steps: int = 100
    decay_fraction: float = 0.25
    """The last part of all tokens, over which the rate falls linearly to a twentieth."""
    start_share: float = 0.0
    """How much of the weights that the run began with is in those that it leaves: the mean of both
    ends keeps of what came before and has of what is new (arXiv 2109.01903)."""

    def __post_init__(self) -> None:
        if not 0 <= self.start_share < 1:
            raise ValueError(f"start_share must lie in [0, 1), got {self.start_share}")
        if not self.stages:
            raise ValueError("a run needs at least one [[stages]] table")
        ends = [stage.until_tokens for stage in self.stages]
        if ends != sorted(set(ends)):
            raise ValueError(f"until_tokens must rise from stage to stage, got {ends}")

    @property
    def total_tokens(self) -> int:
        return self.stages[-1].until_tokens

    def stage_at(self, num_tokens: int) -> Stage:
        """The stage that is on after `num_tokens`."""
        return next((s for s in self.stages if num_tokens < s.until_tokens), self.stages[-1])

    def rate_at(self, step: int, num_tokens: int) -> float:
        """Learning rate: linear warm-up, constant, linear decay to a twentieth."""
        left = (self.total_tokens - num_tokens) / (self.total_tokens * self.decay_fraction)
        scale = min((step + 1) / self.warmup_steps, 1.0, 0.05 + 0.95 * max(left, 0.0))
        return self.learning_rate * scale

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: equal for configurations that are equal."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file. Raises ValueError naming an unknown or missing field."""
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(f"{path}: unknown field {unknown[0]!r}")
        try:
            stages = tuple(
                Stage(
                    until_tokens=stage["until_tokens"],
                    lengths={int(length): weight for length, weight in stage["lengths"].items()},
                    kinds=stage["kinds"],
                    batch_tokens=stage["batch_tokens"],
                )
                for stage in raw.pop("stages")
            )
            model = DeltaNetConfig.from_dict(raw.pop("model"))
        except KeyError as error:
            raise ValueError(f"{path}: missing field {error}") from None
        return cls(model=model, stages=stages, **raw)
