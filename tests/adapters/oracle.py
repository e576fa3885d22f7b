"""The published loop, literally: every truncated prefix is read again from the document's start.

Slow on purpose and free of shortcuts: the reference for the gradients and the cost of the trunk. It
shares no code with `imprint.adapters` beyond the model; a batch never holds more than one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imprint.models import FastWeightModel, LoraDelta


@dataclass(frozen=True)
class Branch:
    """One rollout: where it left, what was sampled, and what that is worth."""

    position: int
    recall: bool
    rollout: list[int]
    advantage: float


@dataclass(frozen=True)
class Settings:
    """The loss of a step."""

    lambda_rl: float
    lambda_ntp: float
    cue_tokens: int
    scope: str
    """lora reads everything with the delta; query_lora only cues and rollouts."""
    rollout_length: int


def full_logits(model: FastWeightModel, tokens: list[int], delta: LoraDelta | None) -> Tensor:
    """Logits [T, V] of a sequence read from zero."""
    hidden, _ = model(torch.tensor([tokens], device=model.device), delta=delta)
    return model.logits(hidden[0])


def branch_token_logprobs(
    model: FastWeightModel,
    document: list[int],
    branch: Branch,
    continuation: list[int],
    settings: Settings,
    delta: LoraDelta | None,
) -> Tensor:
    """Log-probabilities of a continuation after the branch's whole prefix, read from zero."""
    position = branch.position
    cue = document[max(0, position - settings.cue_tokens) : position]
    if settings.scope == "lora":
        prefix = document + cue if branch.recall else document[:position]
        logits = full_logits(model, prefix + continuation, delta)[len(prefix) - 1 : -1]
    else:
        before = document if branch.recall else document[: position - len(cue)]
        with torch.no_grad():
            state = model(torch.tensor([before], device=model.device))[1] if before else None
        tokens = torch.tensor([cue + continuation], device=model.device)
        hidden, _ = model(tokens, state, delta=delta)
        logits = model.logits(hidden[0])[len(cue) - 1 : -1]
    return _logprobs_of(continuation, logits)


def policy_term(
    model: FastWeightModel,
    document: list[int],
    branch: Branch,
    settings: Settings,
    delta: LoraDelta | None,
) -> Tensor:
    """-A * mean logprob of one rollout, through PPO's ratio, which is 1."""
    logprobs = branch_token_logprobs(model, document, branch, branch.rollout, settings, delta)
    ratio = (logprobs - logprobs.detach()).exp()
    return -(branch.advantage * ratio).mean()


def next_token_loss(model: FastWeightModel, document: list[int], delta: LoraDelta | None) -> Tensor:
    """Mean cross-entropy over the document."""
    return -_logprobs_of(document[1:], full_logits(model, document[:-1], delta)).mean()


def _logprobs_of(tokens: list[int], logits: Tensor) -> Tensor:
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0]


def accumulate_gradients(
    model: FastWeightModel,
    document: list[int],
    branches: list[Branch],
    settings: Settings,
    delta: LoraDelta | None,
) -> None:
    """Add the gradient of the whole step to `.grad`, one read and one backward per rollout."""
    for branch in branches:
        term = policy_term(model, document, branch, settings, delta)
        (settings.lambda_rl * term / len(branches)).backward()
    if settings.lambda_ntp == 0:
        return
    if settings.scope == "lora":
        (settings.lambda_ntp * next_token_loss(model, document, delta)).backward()
        return
    places = sorted({(branch.position, branch.recall) for branch in branches})
    for position, recall in places:
        place = Branch(position, recall, [], 0.0)
        truth = document[position : position + settings.rollout_length]
        logprobs = branch_token_logprobs(model, document, place, truth, settings, delta)
        (settings.lambda_ntp * -logprobs.mean() / len(places)).backward()


@torch.no_grad()
def sample(
    model: FastWeightModel,
    prefix: list[int],
    length: int,
    delta: LoraDelta | None,
    generator: torch.Generator,
) -> list[int]:
    """Read the prefix from zero, then sample `length` tokens at temperature 1."""
    hidden, state = model(torch.tensor([prefix], device=model.device), delta=delta)
    rollout: list[int] = []
    for _ in range(length):
        probs = model.logits(hidden[0, -1]).softmax(-1)
        rollout.append(int(torch.multinomial(probs.cpu(), 1, generator=generator)))
        token = torch.tensor([rollout[-1:]], device=model.device)
        hidden, state = model(token, state, delta=delta)
    return rollout


def literal_step(
    model: FastWeightModel,
    document: list[int],
    positions: list[int],
    group_size: int,
    settings: Settings,
    delta: LoraDelta | None,
    generator: torch.Generator,
) -> None:
    """A whole step of `continue` branches as published: entropies, a read of the prefix for every
    rollout, another for its log-probability, and the update. Real tokens only, nothing padded."""
    with torch.no_grad():
        logprobs = full_logits(model, document, delta).log_softmax(-1)
        -(logprobs.exp() * logprobs).sum(-1)
    branches = []
    for position in positions:
        for _ in range(group_size):
            prefix = document[:position]
            rollout = sample(model, prefix, settings.rollout_length, delta, generator)
            with torch.no_grad():
                full_logits(model, prefix + rollout, delta)[position - 1 : -1].log_softmax(-1)
            branches.append(Branch(position, False, rollout, float(rollout[0] % 2) - 0.5))
    accumulate_gradients(model, document, branches, settings, delta)
