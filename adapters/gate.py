"""Does a delta help? The recall probe, the neutral text, and the decision.

The probe asks, from the document's end, for places of the document that no step was trained on: a
cue, then the negative log-likelihood of what follows, base against adapted, paired over places.
Shapes: P = places, K = tokens asked at a place, T = document tokens, Q = deltas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imprint.adapters.config import MAX_BRANCH_TOKENS, RefineConfig
from imprint.adapters.rollout import branch_logprobs, read_cues
from imprint.adapters.selection import select_positions
from imprint.models.architecture import FastWeightModel
from imprint.models.hub import NEUTRAL_FILE
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState
from imprint.models.tokenizer import Tokenizer

_PROBE_STEP = (1 << 19) - 1  # a step no run reaches: keeps the probe's random stream apart
_MAX_NEUTRAL_TOKENS = 256


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


def probe_places(entropy_T: Tensor, config: RefineConfig, *, seed: int) -> tuple[Tensor, Tensor]:
    """Places P to be held out, and excluded_T marking the tokens they ask for.

    At most an eighth of the document's tokens is held out; short documents have fewer places, the
    shortest none. Places are drawn like positions: one a segment, by entropy.
    """
    num_tokens, length = entropy_T.numel(), config.rollout_length
    single = config.replace(group_size=1)  # the probe rolls nothing out
    most = MAX_BRANCH_TOKENS // single.branch_tokens
    num_places = min(config.probe_places, num_tokens // (8 * length), most)
    excluded_T = torch.zeros(num_tokens, dtype=torch.bool)
    if num_places == 0:
        return torch.empty(0, dtype=torch.long), excluded_T
    spread = single.replace(positions=num_places)
    places_P = select_positions(entropy_T, spread, seed=seed, step=_PROBE_STEP)
    for place in places_P.tolist():
        excluded_T[place : place + length] = True
    return places_P, excluded_T


@torch.no_grad()
def recall_probe(
    model: FastWeightModel,
    tokens_T: Tensor,
    places_P: Tensor,
    end_state: RecurrentState,
    config: RefineConfig,
    *,
    delta: LoraDelta | None,
) -> ProbeResult:
    """Ask the places from `end_state` (batch 1). With Q deltas the places are grouped by delta."""
    length = config.rollout_length
    asked_PK = torch.stack([tokens_T[p : p + length] for p in places_P.tolist()])
    state = end_state.fork(len(places_P))
    start = read_cues(model, tokens_T, places_P, state, config.cue_tokens, delta=delta)
    logprobs_P1K = branch_logprobs(
        model, start, asked_PK.unsqueeze(1), delta=delta, temperature=1.0
    )
    return ProbeResult(-logprobs_P1K.squeeze(1).double().mean(-1))


@torch.no_grad()
def neutral_loss(model: FastWeightModel, neutral: list[int], delta: LoraDelta | None) -> float:
    """Mean next-token loss in nats on the neutral text, read from a document's start."""
    tokens_1T = torch.tensor([neutral], device=model.device)
    hidden_1TD, _ = model(tokens_1T, delta=delta)
    return -float(model.token_logprobs(hidden_1TD[:, :-1], tokens_1T[:, 1:]).mean())


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
        accepted, reason = False, "recall of held-out places did not improve beyond its noise"
    elif neutral_rise_nats is not None and not neutral_rise_nats <= config.neutral_margin:
        accepted, reason = False, "the loss on neutral text rose too much"
    return Verdict(
        accepted=accepted,
        reason=reason,
        gain_nats=gain,
        gain_error_nats=error,
        neutral_rise_nats=neutral_rise_nats,
    )
