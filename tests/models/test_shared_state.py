"""A state with fewer rows than the batch serves groups of rows, as if it had been forked."""

from __future__ import annotations

import pytest
import torch

from imprint.models.architecture import FastWeightModel
from imprint.models.state import RecurrentState


def read(
    model: FastWeightModel, state: RecurrentState, num_tokens: int, *, ragged: bool, forked: bool
) -> list[torch.Tensor]:
    """Hidden states, final state and the gradients of the incoming state, of six rows on two."""
    generator = torch.Generator().manual_seed(num_tokens)
    tokens_BT = torch.randint(0, model.config.vocab_size, (6, num_tokens), generator=generator)
    lengths_B = torch.tensor([1, num_tokens] * 3) if ragged else torch.full((6,), num_tokens)
    leaf = state.leaf()
    incoming = leaf.fork(3) if forked else leaf
    hidden_BTD, final = model(tokens_BT, incoming, lengths_B=lengths_B if ragged else None)
    inside = torch.arange(num_tokens) < lengths_B.unsqueeze(1)
    hidden_BTD = hidden_BTD * inside.unsqueeze(-1)
    weights = torch.randn(hidden_BTD.shape, generator=generator, dtype=hidden_BTD.dtype)
    loss = (hidden_BTD * weights).sum()
    for tensor in final.tensors():
        loss = loss + tensor.square().sum()
    loss.backward()
    grads = [grad for grad in leaf.grads() if grad is not None]
    return [hidden_BTD.detach(), *(t.detach() for t in final.tensors()), *grads]


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 17, 40])
def test_shared_rows_equal_forked_rows(
    any_model64: FastWeightModel, num_tokens: int, ragged: bool
) -> None:
    with torch.no_grad():
        _, state = any_model64(torch.arange(60).view(2, 30))
    shared = read(any_model64, state, num_tokens, ragged=ragged, forked=False)
    forked = read(any_model64, state, num_tokens, ragged=ragged, forked=True)
    for mine, theirs in zip(shared, forked, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("num_tokens", [1, 5, 17, 40])
def test_a_state_that_nobody_keeps_changes_nothing(
    any_model64: FastWeightModel, num_tokens: int, ragged: bool
) -> None:
    with torch.no_grad():
        _, state = any_model64(torch.arange(60).view(2, 30))
    tokens_BT = torch.arange(6 * num_tokens).view(6, num_tokens) % any_model64.config.vocab_size
    lengths_B = torch.tensor([1, num_tokens] * 3) if ragged else None
    results = []
    for keep_state in (True, False):
        leaf = state.leaf()
        hidden, final = any_model64(tokens_BT, leaf, lengths_B=lengths_B, keep_state=keep_state)
        assert bool(final.layers) == keep_state
        if lengths_B is not None:
            hidden = hidden * (torch.arange(num_tokens) < lengths_B[:, None]).unsqueeze(-1)
        hidden.sin().sum().backward()
        results.append([hidden.detach(), *(g for g in leaf.grads() if g is not None)])
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
