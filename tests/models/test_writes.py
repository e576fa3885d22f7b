"""Writing strengths: one for each token and layer, the same in any split of the document."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint.models.architecture import FastWeightModel


def test_every_layer_tells_how_strongly_it_wrote(any_model64: FastWeightModel) -> None:
    tokens_BT = torch.randint(0, any_model64.config.vocab_size, (2, 40))
    at_once: list[Tensor] = []
    with torch.no_grad():
        hidden, _ = any_model64(tokens_BT, writes=at_once)
        silent, _ = any_model64(tokens_BT)
        parts: list[list[Tensor]] = []
        state = None
        for piece in (tokens_BT[:, :17], tokens_BT[:, 17:]):
            parts.append([])
            _, state = any_model64(piece, state, writes=parts[-1])
    assert torch.equal(hidden, silent)
    assert len(at_once) == any_model64.config.num_hidden_layers
    for whole, first, second in zip(at_once, *parts, strict=True):
        assert whole.shape == tokens_BT.shape
        assert bool((whole > 0).all())
        assert float(whole.std()) > 0
        torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-5, atol=1e-6)
