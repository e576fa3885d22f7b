"""Does a delta help? The recall probe, the neutral text, and the decision.

The probe asks, from the document's end, for places of the document: a cue, then the negative
log-likelihood of what follows, base against adapted, paired over places. Where positions are chosen
by entropy, no step is trained on these places.
Shapes: P = places, K = tokens asked at a place, T = document tokens, Q = deltas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from imprint.adapters.calls import (
    Call,
    Work,
    delta_key,
    model_key,
    stacked_deltas,
    stacked_states,
    telling_delta,
)
from imprint.adapters.config import MAX_BRANCH_TOKENS, RefineConfig
from imprint.adapters.rollout import Cues, continuations
from imprint.adapters.selection import select_positions
from imprint.models.architecture import FastWeightModel
from imprint.models.hub import NEUTRAL_FILE
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState
from imprint.models.tokenizer import Tokenizer

_PROBE_STEP = (1 << 19) - 1  # a step no run reaches: keeps the probe's random stream apart
_MAX_NEUTRAL_TOKENS = 256
_FEW_PLACES = 8
_STRONGEST = 1e3  # a weight that leaves nothing to chance


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What recall costs at each place: mean negative log-likelihood in nats per token."""

    nll_P: Tensor

    @property
    def mean(self) -> float:
        return float(self.nll_P.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The gate's decision on one delta, with the numbers it was made from."""

    accepted: bool
    reason: str
    gain_nats: float
    """Mean improvement of the probe, nats per token."""
    gain_error_nats: float
    """Standard error of that mean over places."""
    neutral_rise_nats: float | None
    """Rise of the loss on neutral text; None where the checkpoint ships none."""


def load_neutral(folder: Path, tokenizer: Tokenizer) -> list[int] | None:
    """Tokens of the neutral passage of a checkpoint folder, or None if it has none."""
    path = folder / NEUTRAL_FILE
    if not path.is_file():
        return None
    return tokenizer.encode(path.read_text(encoding="utf-8"))[:_MAX_NEUTRAL_TOKENS]


def num_probe_places(num_tokens: int, config: RefineConfig) -> int:
    """How many places judge a study of a document of `num_tokens`."""
    single = config.replace(group_size=1)  # the probe rolls nothing out
    most = MAX_BRANCH_TOKENS // single.branch_tokens
    num = num_tokens // (8 * config.rollout_length)
    # of all steps nothing is held out: short documents can be judged, too
    if config.selection == "write":
        num = max(num, min(_FEW_PLACES, num_tokens // (2 * config.rollout_length)))
    return min(config.probe_places, num, most)


def probe_places(
    entropy_T: Tensor, config: RefineConfig, *, seed: int, write_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Places P that judge, and excluded_T marking the tokens that are held out for them.

    They ask for an eighth of the document's tokens at most; short documents have fewer places, the
    shortest none. Places are drawn like positions: one a segment, by entropy. With selection by
    `write` they are the most strongly written ones, up to eight in short documents, and every
    second one is held out, `HeldOut`, of the first steps only: what is left out of all is lost.
    """
    num_tokens, length = entropy_T.numel(), config.rollout_length
    num_places = num_probe_places(num_tokens, config)
    excluded_T = torch.zeros(num_tokens, dtype=torch.bool)
    if num_places == 0:
        return torch.empty(0, dtype=torch.long), excluded_T
    spread = config.replace(group_size=1, positions=num_places)
    if config.selection == "write":
        strongest = spread.replace(write_gamma=_STRONGEST)
        places_P = select_positions(
            entropy_T, strongest, seed=seed, step=_PROBE_STEP, write_T=write_T
        )
        held_P = places_P[::2]
    else:
        places_P = held_P = select_positions(entropy_T, spread, seed=seed, step=_PROBE_STEP)
    for place in held_P.tolist():
        excluded_T[place : place + length] = True
    return places_P, excluded_T


@dataclass(frozen=True, slots=True, eq=False)
class Probe(Call[ProbeResult]):
    """What the tokens after each cue cost, from `state` and without gradients.

    Each row is its cue and all but the last of the tokens asked for, read in one go.
    """

    stage: ClassVar[int] = 3
    model: FastWeightModel
    rows: Cues
    """With Q deltas they are grouped by delta."""
    asked_PK: Tensor
    state: RecurrentState
    """One row, shared."""
    delta: LoraDelta | None

    @property
    def work(self) -> Work:
        return Work("probe", forward_tokens=self.rows.num_tokens + len(self.asked_PK))

    @property
    def key(self) -> Hashable | None:
        if self.rows.lengths_N is not None:
            return None
        shapes = (self.rows.tokens_NM.shape, self.asked_PK.shape)
        return (
            "probe",
            model_key(self.model),
            shapes,
            self.state.batch_size,
            delta_key(self.delta),
        )

    @torch.no_grad()
    def together(self, calls: Sequence[Self]) -> list[ProbeResult]:
        parts = self._hidden(calls)
        return [call._result(part) for call, part in zip(calls, parts, strict=True)]

    def witness(self, calls: Sequence[Self]) -> list[Tensor]:
        """The hidden states."""
        return self._hidden([dataclasses.replace(c, delta=telling_delta(c.delta)) for c in calls])

    @torch.no_grad()
    def _hidden(self, calls: Sequence[Self]) -> list[Tensor]:
        hidden_BTD, _ = self.model(
            torch.cat([call.rows.tokens_NM for call in calls]),
            stacked_states([call.state for call in calls]),
            delta=stacked_deltas([call.delta for call in calls]),
            lengths_B=self.rows.lengths_N,
            keep_state=False,
        )
        return list(torch.split(hidden_BTD, len(self.asked_PK)))

    def _result(self, hidden_PTD: Tensor) -> ProbeResult:
        asked_from = self.rows.last(hidden_PTD, self.asked_PK.shape[1])
        logprobs_PK = self.model.token_logprobs(asked_from, self.asked_PK)
        return ProbeResult(-logprobs_PK.double().mean(-1))


def probe_call(
    model: FastWeightModel,
    tokens_T: Tensor,
    places_P: Tensor,
    end_state: RecurrentState,
    config: RefineConfig,
    *,
    delta: LoraDelta | None,
    cue_tokens: int | None = None,
) -> Probe:
    """Ask the places from `end_state` (batch 1). With Q deltas the places are grouped by delta.

    `cue_tokens` replaces the config's.
    """
    length = config.rollout_length
    asked_PK = continuations(tokens_T, places_P, length)
    # the last token asked for need not be read
    cues = Cues.before(tokens_T, places_P, cue_tokens or config.cue_tokens)
    rows = cues.followed_by(asked_PK[:, :-1])
    return Probe(model, rows, asked_PK, end_state, delta)


def recall_probe(
    model: FastWeightModel,
    tokens_T: Tensor,
    places_P: Tensor,
    end_state: RecurrentState,
    config: RefineConfig,
    *,
    delta: LoraDelta | None,
) -> ProbeResult:
    """The result of `probe_call`, computed at once."""
    return probe_call(model, tokens_T, places_P, end_state, config, delta=delta).alone()


@dataclass(frozen=True, slots=True, eq=False)
class NeutralLoss(Call[float]):
    """Mean next-token loss in nats on the neutral text, read from a document's start."""

    stage: ClassVar[int] = 4
    model: FastWeightModel
    tokens_1T: Tensor
    delta: LoraDelta | None
    start: RecurrentState | None = None
    """What it is read from [1 row]; the model's own start if not given."""

    @property
    def work(self) -> Work:
        return Work("gate", forward_tokens=self.tokens_1T.numel())

    @property
    def key(self) -> Hashable:
        delta = (model_key(self.model), delta_key(self.delta))
        return ("neutral", self.tokens_1T.numel(), delta, self.start is None)

    @torch.no_grad()
    def together(self, calls: Sequence[Self]) -> list[float]:
        hidden_BTD = self._hidden(calls)
        return [call._result(hidden_TD) for call, hidden_TD in zip(calls, hidden_BTD, strict=True)]

    def witness(self, calls: Sequence[Self]) -> list[Tensor]:
        """The hidden states."""
        return list(
            self._hidden([dataclasses.replace(c, delta=telling_delta(c.delta)) for c in calls])
        )

    @torch.no_grad()
    def _hidden(self, calls: Sequence[Self]) -> Tensor:
        starts = [call.start for call in calls if call.start is not None]
        hidden_BTD: Tensor
        hidden_BTD, _ = self.model(
            torch.cat([call.tokens_1T for call in calls]),
            stacked_states(starts) if starts else None,
            delta=stacked_deltas([call.delta for call in calls]),
            keep_state=False,
        )
        return hidden_BTD

    def _result(self, hidden_TD: Tensor) -> float:
        return -float(self.model.token_logprobs(hidden_TD[:-1], self.tokens_1T[0, 1:]).mean())


def neutral_call(
    model: FastWeightModel,
    neutral: Sequence[int],
    delta: LoraDelta | None,
    start: RecurrentState | None = None,
) -> NeutralLoss:
    """The loss on the neutral text under `delta`, read from `start`."""
    return NeutralLoss(model, torch.tensor([neutral], device=model.device), delta, start)


def neutral_loss(model: FastWeightModel, neutral: Sequence[int], delta: LoraDelta | None) -> float:
    """The result of `neutral_call`, computed at once."""
    return neutral_call(model, neutral, delta).alone()


def judge(
    base: ProbeResult,
    adapted: ProbeResult,
    config: RefineConfig,
    *,
    neutral_rise_nats: float | None,
) -> Verdict:
    """Accept if recall improves by more than margin and own noise, and neutral text holds."""
    gain_P = base.nll_P - adapted.nll_P
    gain = float(gain_P.mean())
    error = float(gain_P.std() / math.sqrt(len(gain_P))) if len(gain_P) > 1 else 0.0
    reason = "recall improved"
    accepted = True
    if not (math.isfinite(gain) and math.isfinite(error)):
        accepted, reason = False, "the probe is not finite"
    elif len(gain_P) < 2 and config.probe_confidence > 0:
        accepted, reason = False, "a single place cannot tell an improvement from noise"
    elif gain - config.probe_confidence * error <= config.probe_margin:
        accepted, reason = False, "recall did not improve beyond its noise"
    elif neutral_rise_nats is not None and not neutral_rise_nats <= config.neutral_margin:
        accepted, reason = False, "the loss on neutral text rose too much"
    return Verdict(
        accepted=accepted,
        reason=reason,
        gain_nats=gain,
        gain_error_nats=error,
        neutral_rise_nats=neutral_rise_nats,
    )
