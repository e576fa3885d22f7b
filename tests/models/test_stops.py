"""States after chosen tokens of one read equal the states of separate reads, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imprint.models.architecture import FastWeightModel
from imprint.models.state import RecurrentState


def separately(
    model: FastWeightModel, tokens_T: Tensor, state: RecurrentState, stops: list[int]
) -> tuple[Tensor, RecurrentState]:
    hiddens, states, start = [], [], 0
    for stop in stops:
        if stop > start:
            hidden, state = model(tokens_T[start:stop].unsqueeze(0), state)
            hiddens.append(hidden)
        states.append(state)
        start = stop
    return torch.cat(hiddens, 1), RecurrentState.stack(states)


@pytest.mark.parametrize(
    ("num_tokens", "stops"),
    [(1, [1]), (1, [1, 1]), (20, [1, 16, 17, 20]), (100, [31, 32, 33, 33, 64, 99, 100])],
)
def test_stops_equal_separate_reads(
    any_model64: FastWeightModel, num_tokens: int, stops: list[int]
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    vocab_size = any_model64.config.vocab_size
    tokens_T = torch.randint(0, vocab_size, (num_tokens + 10,), generator=generator)
    with torch.no_grad():
        _, before = any_model64(tokens_T[:10].unsqueeze(0))
    results = []
    for at_once in (True, False):
        leaf = before.leaf()
        if at_once:
            hidden, states = any_model64(tokens_T[10:].unsqueeze(0), leaf, stops=stops)
        else:
            hidden, states = separately(any_model64, tokens_T[10:], leaf, stops)
        assert states.batch_size == len(stops)
        generator.manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for tensor in (hidden, *states.tensors()):
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            loss = loss + (tensor * weights).sum()
        loss.backward()
        grads = [grad for grad in leaf.grads() if grad is not None]
        results.append([hidden.detach(), *(t.detach() for t in states.tensors()), *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
