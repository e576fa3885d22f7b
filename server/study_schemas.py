"""Shapes of replies about how a study went, for the OpenAPI document. Checks nothing."""

from typing import Literal

from imprint.server.reply_schemas import Page, Reply


class Rollout(Reply):
    """What the model wrote at a position, and how well that was."""

    text: str
    reward: float


class StudiedPosition(Reply):
    """A place where a step tried itself."""

    position: int
    cue: str
    truth: str
    rollouts: list[Rollout]


class StudyStep(Reply):
    """What one step tried."""

    step: int
    num_positions: int
    positions: list[StudiedPosition]


class StudySteps(Page[StudyStep]):
    """Steps of a study."""

    adaptation: str
    num_tokens: int


class StudyProfile(Reply):
    """A document's entropies in few numbers, in nats."""

    object: Literal["study.profile"]
    adaptation: str
    num_tokens: int
    entropy_mean: float
    low: float
    high: float
    """Nine of ten tokens lie between `low` and `high`."""
    entropies: list[float]
    """Means of pieces of equal length, in order."""


class StudyTokens(Reply):
    """A document token by token."""

    object: Literal["study.tokens"]
    adaptation: str
    num_tokens: int
    first: int
    texts: list[str]
    entropies: list[float | None]
    """Of the model before each token, in nats; null for the first one."""
    has_more: bool
