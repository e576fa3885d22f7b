"""What one adaptation is asked to do: `RefineConfig`, its presets and its checks.

Limit: numbers and names only. Imports no torch, so the HTTP process can validate a request with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from imprint.adapters.config_fields import RANGES, check_field, names_of
from imprint.adapters.errors import ConfigError

NOT_SERVED: Final = (
    "scope full trains every weight in a copy of the model, which no server keeps for a document: "
    "it is for imprint eval; take lora, query_lora or state"
)
NO_ENCODER: Final = (
    "reward semantic needs an encoder, and none is set: --reward-encoder module:function"
)
MAX_RATES: Final = 8
"""Learning rates that one study may try."""
MAX_BRANCH_TOKENS: Final = 65536
"""Bound of what the branches of one step may cost together."""
_OF_ROLLOUTS: Final = frozenset(
    ("reward", "advantage", "group_size", "temperature", "clip_low", "clip_high", "dual_clip")
)
"""Fields that say something about rollouts only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineConfig:
    """Settings of one adaptation; the defaults are the preset `default`."""

    steps: int = 12
    """Optimizer steps. A focus may take none: then drafts of its ways to answer are compared."""
    positions: int = 16
    """Positions selected per step (c)."""
    rollout_length: int = 10
    """Tokens per rollout (k), never cut short."""
    group_size: int = 2
    """Rollouts per position (n); with 1, all positions of the document form one group."""
    selection: str = "write"
    """How positions are chosen: one in each segment by entropy, uniform, argmax or argmin; or
    anywhere by write, where the memory itself wrote most strongly while it was read."""
    selection_temperature: float = 1.0
    """tau of softmax(entropy / tau), in nats."""
    smoothing: int = 0
    """Odd width of the average over neighbouring entropies; 0 means k, or k + 1 when k is even."""
    margin_tokens: int = 20
    """Distance of a position from both ends, where the document is long enough for it."""
    branches: str = "recall"
    """continue: leave at the position. recall: leave at the document's end, after a cue."""
    recall_fraction: float = 0.5
    """With branches = mixed: the share of positions that recall."""
    cue_tokens: int = 12
    """Document tokens before the position that a recalling branch is given (m)."""
    reward: str = "expected_exact"
    """exact, cosine, hybrid, expected_exact, ngram or edit; or semantic, where the user has plugged
    an encoder in."""
    advantage: str = "rloo"
    """grpo, rloo or dr_grpo."""
    lambda_rl: float = 0.4
    """Weight of the policy loss; 0 samples no rollouts."""
    lambda_ntp: float = 1.0
    """Weight of the next-token loss: over the branches (query_lora), else over the document."""
    min_entropy: float = 1.0
    """A token of a branch's continuation counts in the branch's losses only where the reading
    expected the document's token with this entropy, in nats, at least; 0 counts every token. What
    the reading was sure of is the text's form; practised, it takes the place of an answer's own.
    Rewards are over all places even so, and so is a next-token loss over the document."""
    learning_rate: float = 1e-2
    """AdamW learning rate of what is trained."""
    learning_rates: tuple[float, ...] = ()
    """Rates of which a document's own is chosen: each is tried from the same start, and the best by
    the probe takes the place of learning_rate. Empty: none is tried."""
    trial_steps: int = 2
    """Steps of such a trial."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW decay rates of the two moments."""
    weight_decay: float = 0.0
    """AdamW decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest gradient norm of one document's step."""
    clip_low: float = 0.2
    """PPO: smallest ratio is 1 - clip_low."""
    clip_high: float = 0.2
    """PPO: largest ratio is 1 + clip_high."""
    dual_clip: float = 3.0
    """PPO: bound of the loss where the advantage is negative."""
    scope: str = "query_lora"
    """What is trained. lora: a delta that reads and answers. query_lora: a delta that sees branches
    and questions only. state: the recurrent state that the document is read from. full: every
    weight, of a copy of the model; no server does that."""
    lora_rank: int = 8
    """Rank of the delta."""
    lora_targets: tuple[str, ...] = ()
    """Endings of the projections that get a delta; empty means all of them."""
    segment_tokens: int = 512
    """Tokens of one reading segment (C): bounds activation memory and the longest quantum."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    write_gamma: float = 3.0
    """Weight of the writing strength, in standard deviations, with selection = write."""
    held_steps: int = 4
    """With selection = write: the first steps, which leave out half of the places that judge. Half
    of what they learnt must recall those better on average, or the study is refused. Later steps
    study them, too: what is left out of a study is lost. 0: nothing is held out."""
    focus_gamma: float = 25.0
    """Weight of relevance (0 to 1) against entropy in nats when questions choose the positions."""
    focus_window: int = 16
    """Tokens after a match of a question term that it makes relevant, the nearest ones most."""
    focus_spread: float = 0.25
    """Share of positions drawn from before the matches as well: answers may stand there, too."""
    focus_passages: int = 4
    """Passages with the most relevant places, read again before a question that is studied for; 0:
    none. What a full memory mixes up it has just seen once more, at a cost that does not depend on
    the document's length."""
    focus_passage_tokens: int = 64
    """Tokens of such a passage."""
    focus_repeat: float = 0.5
    """What a term of the question that a passage has still weighs in the choice of the next; 1: all
    of it. The less, the more the passages hold of all that is asked for, not of the same thing."""
    focus_memory: float = 0.5
    """Strength that the document's memory has left when passages are read again; 1: all. The less
    it has, the more what was just read weighs against what a full memory mixes up with it."""
    focus_draft_tokens: int = 48
    """Tokens of the drafts of each answer: with what was done for the question, with its passages
    alone, without either, and without what the document's study left. It is answered as the best
    of them is. 0: no drafts are written."""
    focus_draft_grounding: float = 0.5
    """What a draft that copies the document is worth: its tokens' mean log-probability in nats and
    so many times ln(1 + n) decide, n its runs of four tokens that the document has and the question
    has not. 0: the model's confidence alone decides."""
    patience: int = 3
    """Probes in a row without improvement after which the steps stop."""
    probe_places: int = 32
    """Places held out of the adaptation that judge it; short documents have fewer."""
    probe_margin: float = 0.0
    """Nats per token by which the probe must improve to be accepted."""
    probe_confidence: float = 2.0
    """Standard errors by which the probe's mean improvement must exceed that margin."""
    neutral_margin: float = 0.4
    """Nats per token by which the loss on neutral text may rise."""
    blend_factors: tuple[float, ...] = (0.5, 0.25)
    """Factors by which the best delta is scaled before the gate judges it, in this order. Half way
    to the base keeps what is new and harms less of what the memory had."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check_field(field.name, getattr(self, field.name), field.default)
            object.__setattr__(self, field.name, value)
        if self.smoothing and self.smoothing % 2 == 0:
            raise ConfigError("smoothing", f"smoothing must be odd or 0, got {self.smoothing}")
        if self.lambda_rl == 0 and self.lambda_ntp == 0:
            raise ConfigError("lambda_rl", "lambda_rl and lambda_ntp cannot both be 0")
        if self.positions * self.branch_tokens > MAX_BRANCH_TOKENS:
            raise ConfigError(
                "positions",
                f"positions * (cue_tokens + (group_size + 1) * rollout_length) must be at most "
                f"{MAX_BRANCH_TOKENS}, got {self.positions * self.branch_tokens}",
            )
        low, high = RANGES["learning_rate"]
        rates = self.learning_rates
        if len(rates) > MAX_RATES or not all(low <= rate <= high for rate in rates):
            raise ConfigError(
                "learning_rates",
                f"learning_rates must be at most {MAX_RATES} between {low} and {high}, got {rates}",
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas", f"betas must lie in [0, 1), got {self.betas}")
        if not self.blend_factors or not all(0 < factor <= 1 for factor in self.blend_factors):
            raise ConfigError(
                "blend_factors", f"blend_factors must lie in (0, 1], got {self.blend_factors}"
            )

    @property
    def smoothing_width(self) -> int:
        """The odd kernel that smooths the entropies."""
        return self.smoothing or self.rollout_length + (self.rollout_length % 2 == 0)

    @property
    def branch_tokens(self) -> int:
        """Tokens that a position's cue, rollouts and true continuation have together."""
        num_rollouts = self.group_size if self.lambda_rl > 0 else 0
        return self.cue_tokens + (num_rollouts + 1) * self.rollout_length

    @property
    def probe_cue_tokens(self) -> int:
        """Cue of the places that judge: where they are studied as well, they get half of one. What
        counts is the memory, not the cue."""
        return max(self.cue_tokens // 2, 1) if self.selection == "write" else self.cue_tokens

    @property
    def branches_at_once(self) -> int:
        """How many positions fit one quantum of about two segments."""
        return max(1, 2 * self.segment_tokens // self.branch_tokens)

    @property
    def reads_again(self) -> bool:
        """Whether what is trained changes how the document is read, so that every step reads it."""
        return self.scope != "query_lora"

    @property
    def needs_hidden(self) -> bool:
        """Whether the reward compares hidden states."""
        return self.reward in ("cosine", "hybrid")

    @classmethod
    def preset(cls, name: str, /, **overrides: Any) -> RefineConfig:
        """A named preset with single fields replaced."""
        return cls.from_dict({**overrides, "preset": name})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefineConfig:
        """Build from plain JSON values; an entry `preset` gives the base of the others.

        Raises ConfigError, with the field's name, for unknown fields, unusable values, and what
        would have no effect because the preset draws no rollouts.
        """
        given = frozenset(values)
        values = dict(values)
        if "preset" in values:
            name = values.pop("preset")
            if not isinstance(name, str) or name not in PRESETS:
                known_names = names_of(PRESETS)
                raise ConfigError("preset", f"preset must be one of {known_names}, got {name!r}")
            values = {**PRESETS[name], **values}
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(str(name), f"unknown field {name!r}; known: {names_of(known)}")
        config = cls(**values)
        idle = sorted(_OF_ROLLOUTS & given)
        if idle and config.lambda_rl == 0 and "lambda_rl" not in given:
            raise ConfigError(
                idle[0],
                f"{idle[0]} concerns rollouts, and this preset draws none: give lambda_rl as well, "
                f"such as {cls().lambda_rl}",
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every field; `from_dict` gives the same config back."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}

    def replace(self, **overrides: Any) -> RefineConfig:
        """A copy with single fields replaced, checked again."""
        return RefineConfig.from_dict({**self.to_dict(), **overrides})


def config_of_study(fields: Mapping[str, Any]) -> RefineConfig:
    """The settings of a document's study.

    Raises ConfigError as `RefineConfig.from_dict` and `check_study` do.
    """
    config = RefineConfig.from_dict(fields)
    check_study(config)
    return config


def check_study(config: RefineConfig) -> None:
    """Raises ConfigError for settings with which nothing of a document is studied."""
    if config.steps < 1:
        raise ConfigError("steps", "a study takes one step or more; only a focus may take none")


def config_of_focus(overrides: Mapping[str, Any]) -> RefineConfig:
    """The preset `focus` with a request's fields in place of its own.

    Raises ConfigError as `RefineConfig.from_dict` and `check_focus` do.
    """
    config = RefineConfig.from_dict({"preset": "focus", **overrides})
    check_focus(config)
    return config


def check_focus(config: RefineConfig) -> None:
    """Raises ConfigError for settings with which nothing can be studied for questions."""
    if config.scope != "query_lora":
        raise ConfigError("scope", f"focus needs scope query_lora, got {config.scope!r}")
    if config.branches != "recall":
        raise ConfigError("branches", f"focus needs branches recall, got {config.branches!r}")
    if config.learning_rates:
        raise ConfigError("learning_rates", "focus tries no learning_rates; give learning_rate")


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    # without rollouts, and with fewer steps and places to judge by
    "fast": {"steps": 8, "lambda_rl": 0.0, "probe_places": 16},
    # the questions are known and choose the positions; a step costs some hundred tokens. Rollouts
    # were measured to add nothing to that, in twice the time; their size is for who asks for them
    "focus": {
        "scope": "query_lora",
        "branches": "recall",
        "steps": 8,
        "positions": 16,
        "learning_rate": 1e-2,
        "lambda_rl": 0.0,
        "group_size": 2,
        "rollout_length": 10,
        "cue_tokens": 12,
        "lora_targets": (),
        # the passages say what is asked for, half of a delta drops values from lists of it
        "blend_factors": (0.25, 0.125),
    },
    # nothing is learnt or read again for a question: a focus that only compares drafts of what a
    # study left with ones of what was read
    "drafts": {"scope": "query_lora", "branches": "recall", "steps": 0, "focus_passages": 0},
    # arXiv 2602.16704, test time. The paper trains every weight (scope full); here it is lora, the
    # widest scope that is served. The numbers are for parity, and no good serving defaults.
    "paper": {
        "steps": 1,
        "positions": 8,
        "rollout_length": 5,
        "group_size": 1,
        "selection": "entropy",
        "selection_temperature": 1.0,
        "branches": "continue",
        "reward": "exact",
        "advantage": "grpo",
        "lambda_rl": 0.4,
        "lambda_ntp": 1.0,
        "learning_rate": 1e-6,
        "weight_decay": 0.01,
        "grad_clip": 1.0,
        "scope": "lora",
        "lora_targets": (),
        "neutral_margin": 0.05,
        "blend_factors": (1.0, 0.5, 0.25),
        "min_entropy": 0.0,
    },
}
"""Fields in which each preset differs from, or insists on, the defaults of `RefineConfig`."""
