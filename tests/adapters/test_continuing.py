"""Reading on from an adapter: the same as reading the whole, at the cost of what is new."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.continuing import begins
from imprint.adapters.document import DocumentReader
from imprint.adapters.refine import Refiner
from imprint.models import DeltaNet

SEGMENT = 64


def document(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 257, (num_tokens,), generator=generator).tolist()


def read(model: DeltaNet, tokens: Sequence[int], base: Adapter | None = None) -> Adapter:
    reader = DocumentReader(model, tokens, segment_tokens=SEGMENT, base=base)
    list(reader.run())
    assert reader.adapter is not None
    return reader.adapter


@pytest.mark.parametrize("border", [1, 63, 64, 65, 128, 199])
def test_reading_on_equals_reading_the_whole(tiny_model: DeltaNet, border: int) -> None:
    tokens = document(200)
    whole = read(tiny_model, tokens)
    base = read(tiny_model, tokens[:border])
    appended = read(tiny_model, tokens, base)
    assert appended.manifest["usage"]["tokens_forward"] == 200 - border
    pairs = list(zip(appended.state.tensors(), whole.state.tensors(), strict=True))
    pairs += [(appended.entropy_T, whole.entropy_T), (appended.tokens_T, whole.tokens_T)]
    if border % SEGMENT == 0:
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_study_goes_on_from_the_older_version(tiny_model: DeltaNet) -> None:
    tokens = document(320)
    settings = {"steps": 2, "segment_tokens": SEGMENT, "selection": "entropy", "rollout_length": 5}
    config = RefineConfig.from_dict(settings)
    base = read(tiny_model, tokens[:256])
    adapters = []
    for start in (None, base):
        refiner = Refiner(tiny_model, tokens, config, seed=1, base=start)
        list(refiner.run())
        assert refiner.adapter is not None
        adapters.append(refiner.adapter)
    whole, appended = adapters
    spent = [adapter.manifest["usage"]["tokens_forward"] for adapter in adapters]
    assert spent[0] - spent[1] == 256
    assert whole.manifest["result"] == appended.manifest["result"]
    for mine, theirs in zip(appended.state.tensors(), whole.state.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_only_a_beginning_of_the_same_document_will_do(tiny_model: DeltaNet) -> None:
    tokens = document(100)
    tokens_T = torch.tensor(tokens)
    base = read(tiny_model, tokens[:60])
    assert begins(base, tokens_T)
    assert not begins(None, tokens_T)
    assert not begins(base, tokens_T[:60]), "nothing is new"
    assert not begins(base, tokens_T.flip(0))
