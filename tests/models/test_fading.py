"""A memory with a share of its strength: none is a document's start, and only the memory fades."""

from __future__ import annotations

import pytest
import torch

from imprint.models.architecture import FastWeightModel
from imprint.models.lact import LactMixer
from imprint.models.state import RecurrentState


def read(model: FastWeightModel, num_tokens: int) -> RecurrentState:
    generator = torch.Generator().manual_seed(num_tokens)
    tokens_BT = torch.randint(0, model.config.vocab_size, (1, num_tokens), generator=generator)
    with torch.no_grad():
        return model(tokens_BT)[1]


def memory(model: FastWeightModel, state: RecurrentState) -> list[torch.Tensor]:
    """What of each layer is fast weights, as a difference to where they start."""
    found = []
    for mixer, layer in zip(model.mixers, state.layers, strict=True):
        if isinstance(mixer, LactMixer):
            starts = mixer.initial_weights()._asdict().items()
            found += [layer[f"fast_{name}"] - start for name, start in starts]
        else:
            found.append(layer["S"])
    return found


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_memory_goes_back_towards_its_start(any_model64: FastWeightModel, share: float) -> None:
    state = read(any_model64, 30)
    before = state.clone()
    faded = any_model64.faded(state, share)
    for own, left in zip(memory(any_model64, state), memory(any_model64, faded), strict=True):
        assert float(own.abs().max()) > 0
        torch.testing.assert_close(left, share * own, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(state.layers, faded.layers, strict=True):
        kept = [name for name in mine if name.startswith(("conv", "window", "rates", "position"))]
        assert kept
        assert all(torch.equal(mine[name], theirs[name]) for name in kept)
        fading = [name for name in mine if name.startswith("momentum")]
        assert all(torch.equal(share * mine[name], theirs[name]) for name in fading)
    for tensor, right in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(tensor, right)


def test_a_chunk_that_is_not_complete_has_nothing_to_fade(any_model64: FastWeightModel) -> None:
    state = read(any_model64, 7)
    faded = any_model64.faded(state, 0.5)
    tokens = torch.arange(1, 6)[None]
    with torch.no_grad():
        same = torch.equal(any_model64(tokens, state)[0], any_model64(tokens, faded)[0])
    assert same == isinstance(any_model64.mixers[0], LactMixer)
