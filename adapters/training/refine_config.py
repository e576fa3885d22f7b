"""What a run of REFINE training is: read from a TOML file, checked once. Loads no torch.

Mid-training adapts all weights to long text, post-training to prompts and their responses; both
take the step that adapts a document in the server (arXiv 2602.16704, section "phases").
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from imprint.adapters.config import RefineConfig
from imprint.adapters.config_fields import REWARDS
from imprint.adapters.errors import ConfigError

Phase = Literal["mid", "post"]

_METHOD: Final[dict[str, Any]] = {
    "positions": 8,
    "rollout_length": 5,
    "group_size": 1,
    "selection": "entropy",
    "branches": "continue",
    "advantage": "grpo",
    "lambda_rl": 0.2,
    "lambda_ntp": 1.0,
    "min_entropy": 0.0,
}
"""What the paper trains with, in both phases."""
_REWARDS: Final[dict[Phase, str]] = {"mid": "cosine", "post": "hybrid"}
_UNUSED: Final = frozenset(
    {"steps", "scope", "lora_rank", "lora_targets", "learning_rate", "betas", "weight_decay"}
    | {"grad_clip", "patience", "blend_factors", "learning_rates", "trial_steps"}
    | {"held_steps", "probe_places", "probe_margin", "probe_confidence", "neutral_margin"}
    | {"cue_tokens", "recall_fraction", "focus_gamma", "focus_window", "focus_spread"}
    | {"focus_passages", "focus_passage_tokens", "focus_repeat", "focus_memory"}
    | {"focus_draft_tokens", "focus_draft_grounding", "min_entropy"}
)
"""Fields of RefineConfig that say how a server adapts; a run has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineTrainingConfig:
    """One run. Every field of the TOML file is one of these; unknown ones are refused."""

    phase: Phase
    """mid: long text. post: prompts with responses."""
    steps: int = 100
    """Rounds. A round of mid-training is one update; one of post-training `prompt_steps` more."""
    documents: int = 4
    """Documents, or prompts, of one update. Gradients are means over them."""
    document_tokens: int = 2048
    """Length of a document; longer prompts are left out."""
    prompt_steps: int = 1
    """Post-training: REFINE updates on the prompts before the one on the responses. 0 is plain
    supervised training."""
    learning_rate: float = 1e-5
    """AdamW, after the warm-up."""
    warmup_steps: int = 10
    """Updates over which the rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest norm of a whole gradient."""
    seed: int = 0
    """Decides which documents and which rollouts."""
    max_corpus_chars: int = 200_000_000
    """Characters of text kept in memory."""
    method: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    """The step; lambda_rl = 0 is next-token training alone."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("documents", 1), ("document_tokens", 64)):
            _at_least(name, getattr(self, name), least)
        for name in ("prompt_steps", "warmup_steps", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        if self.method.branches != "continue":
            raise ValueError(f"[method] branches must be continue, got {self.method.branches}")
        if self.method.reward == "semantic":
            known = ", ".join(name for name in REWARDS if name != "semantic")
            raise ValueError(
                "[method] reward semantic needs an encoder, and training runs have none: "
                f"take {known}"
            )

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one round."""
        return 1 if self.phase == "mid" else self.prompt_steps + 1

    def rate_at(self, update: int) -> float:
        """Learning rate of an update, counted from 0."""
        return self.learning_rate * min(1.0, (update + 1) / max(self.warmup_steps, 1))

    @classmethod
    def load(cls, phase: Phase, path: Path | None) -> Self:
        """Read a TOML file (None: all defaults). Raises ValueError naming what is wrong."""
        raw: dict[str, Any] = {}
        if path is not None:
            try:
                raw = tomllib.loads(path.read_text(encoding="utf-8"))
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{path} is not TOML: {error}") from None
        try:
            return cls.from_dict(phase, raw)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}" if path else str(error)) from None

    @classmethod
    def from_dict(cls, phase: Phase, raw: dict[str, Any]) -> Self:
        """From the tables of a TOML file; [method] takes fields of RefineConfig."""
        fields = dict(raw)
        given = fields.pop("method", {})
        known = {field.name for field in dataclasses.fields(cls)} - {"phase", "method"}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown field {unknown[0]!r}; there is {', '.join(sorted(known))}")
        for field in dataclasses.fields(cls):
            if field.name in fields:
                fields[field.name] = _typed(field.name, fields[field.name], str(field.type))
        if unused := sorted(set(given) & _UNUSED):
            raise ValueError(f"[method] {unused[0]} has no meaning in a training run")
        try:
            method = RefineConfig(**{**_METHOD, "reward": _REWARDS[phase], **given})
        except ConfigError as error:
            raise ValueError(f"[method] {error}") from None
        except TypeError:
            names = {field.name for field in dataclasses.fields(RefineConfig)} - _UNUSED
            strange = sorted(set(given) - names)
            raise ValueError(f"[method] has no field {strange[0]!r}") from None
        return cls(phase=phase, method=method, **fields)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: two runs are the same if these are."""
        method = {k: v for k, v in self.method.to_dict().items() if k not in _UNUSED}
        return {**dataclasses.asdict(self), "method": method}


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _typed(name: str, value: Any, kind: str) -> Any:
    if kind == "tuple[float, float]":
        if not (isinstance(value, list) and len(value) == 2 and all(_is_number(v) for v in value)):
            raise ValueError(f"{name} must be two numbers, got {value!r}")
        return tuple(map(float, value))
    if kind == "int" and not (isinstance(value, int) and not isinstance(value, bool)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if kind == "float":
        if not _is_number(value):
            raise ValueError(f"{name} must be a number, got {value!r}")
        return float(value)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
