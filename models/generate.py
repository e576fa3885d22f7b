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
    hidden_BTD, state = model(tokens_BT, state, delta=delta, lengths_B=lengths_B)
    if lengths_B is None:
        last_BD = hidden_BTD[:, -1]
    else:
        last_BD = hidden_BTD[
            torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), lengths_B - 1
        ]
    return model.logits(last_BD), state


def decode(
    model: FastWeightModel,
    tokens_B: Tensor,
    state: RecurrentState,
    *,
    delta: LoraDelta | None = None,
) -> tuple[Tensor, RecurrentState]:
    """Read one token a row; returns (logits [B, V], state), the incoming state left alone."""
    return prefill(model, tokens_B.unsqueeze(1), state, delta=delta)


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
    logits_BV, state = prefill(model, tokens_BT, state, delta=delta, lengths_B=lengths_B)
    out = [logits_BV.argmax(-1)]
    while len(out) < num_tokens:
        logits_BV, state = decode(model, out[-1], state, delta=delta)
        out.append(logits_BV.argmax(-1))
    return torch.stack(out, 1)
