"""Prefill and decode: pure functions of (model, tokens, state), without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.lora import LoraDelta
from imprint.models.state import RecurrentState


@torch.no_grad()
def prefill(
    model: FastWeightModel,
    tokens_BT: Tensor,
    state: RecurrentState | None = None,
    *,
    delta: LoraDelta | None = None,
    lengths_B: Tensor | None = None,
) -> tuple[Tensor, RecurrentState]:
    """Read tokens; returns (logits [B, V] after each row's last token, state)."""
    last_BD, state = _read_to_last(model, tokens_BT, state, delta, lengths_B)
    return model.logits(last_BD), state


def _read_to_last(
    model: FastWeightModel,
    tokens_BT: Tensor,
    state: RecurrentState | None,
    delta: LoraDelta | None,
    lengths_B: Tensor | None,
) -> tuple[Tensor, RecurrentState]:
    """Hidden states [B, D] after each row's last token, and the state."""
    hidden_BTD, state = model(tokens_BT, state, delta=delta, lengths_B=lengths_B)
    if lengths_B is None:
        return hidden_BTD[:, -1], state
    rows = torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device)
    return hidden_BTD[rows, lengths_B - 1], state


def decode(
    model: FastWeightModel,
    tokens_B: Tensor,
    state: RecurrentState,
    *,
    delta: LoraDelta | None = None,
) -> tuple[Tensor, RecurrentState]:
    """Read one token a row; returns (logits [B, V], state), the incoming state left alone."""
    return prefill(model, tokens_B.unsqueeze(1), state, delta=delta)


@torch.no_grad()
def generate_greedy(
    model: FastWeightModel,
    tokens_BT: Tensor,
    state: RecurrentState | None,
    *,
    num_tokens: int,
    delta: LoraDelta | None = None,
    lengths_B: Tensor | None = None,
) -> Tensor:
    """Prefill, then exactly `num_tokens` of greedy decoding: the new tokens [B, num_tokens]."""
    last_BD, state = _read_to_last(model, tokens_BT, state, delta, lengths_B)
    out = [model.most_likely(last_BD)]
    while len(out) < num_tokens:
        last_BD, state = _read_to_last(model, out[-1].unsqueeze(1), state, delta, None)
        out.append(model.most_likely(last_BD))
    return torch.stack(out, 1)
