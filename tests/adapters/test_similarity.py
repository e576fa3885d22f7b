"""The reward `semantic`: an encoder of the user's, its cosines, and what is said where it fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from imprint.adapters.adapter import Adapter
from imprint.adapters.config import RefineConfig
from imprint.adapters.errors import AdaptationError, ConfigError
from imprint.adapters.focus import Focus
from imprint.adapters.refine import Refiner
from imprint.adapters.similarity import EncoderError, Similarity, load_encoder, load_similarity
from imprint.models import DeltaNet
from imprint.server.errors import InvalidRequestError
from imprint.server.schemas import parse_focus, parse_method


def spell(tokens: list[int]) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


def letters(texts: list[str]) -> list[list[float]]:
    """How often each letter stands in a text: the order does not matter."""
    return [[float(text.count(chr(97 + i))) for i in range(26)] for text in texts]


def test_rollouts_are_compared_with_their_own_truth() -> None:
    asked: list[list[str]] = []

    def encoder(texts: list[str]) -> Any:
        asked.append(texts)
        return np.array(letters(texts), dtype=np.float32)

    similarity = Similarity("letters", encoder, spell)
    truth_NK = torch.tensor([[0, 1, 2], [3, 3, 3]])
    tokens_NGK = torch.tensor([[[2, 1, 0], [3, 3, 3]], [[3, 3, 4], [0, 1, 2]]])
    cosines = similarity.cosines(tokens_NGK, truth_NK)
    right = torch.tensor([[1.0, 0.0], [2 / 5**0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cosines, right)
    assert asked == [["cba", "ddd", "dde", "abc"]]  # each text once


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 2.0]], r"\[1, 2\] for 2 texts"),
        ([1.0, 2.0], r"\[2\] for 2 texts"),
        ([[1.0], [1.0, 2.0]], "inhomogeneous"),
        (["a", "b"], "could not convert"),
        (None, "for 2 texts"),
        ([[1.0], [float("nan")]], "not finite"),
    ],
)
def test_what_is_no_vectors_ends_the_study_by_name(vectors: Any, message: str) -> None:
    similarity = Similarity("mine:encode", lambda texts: vectors, spell)
    with pytest.raises(AdaptationError, match=f"mine:encode gave .*{message}") as error:
        similarity.cosines(torch.tensor([[[1, 2]]]), torch.tensor([[3, 4]]))
    assert error.value.code == "encoder_failed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json", "is named module:function"),
        ("json:", "is named module:function"),
        ("no.such.module:f", "no.such.module:f cannot be loaded: No module named"),
        ("json:nothing", "json has no function nothing"),
        ("json:__name__", "json has no function __name__"),
    ],
)
def test_an_encoder_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(name)


def test_no_name_is_no_encoder() -> None:
    assert load_similarity("", spell) is None


@pytest.mark.parametrize("scope", ["query_lora", "lora"])
def test_a_study_is_rewarded_by_it(
    tiny_model: DeltaNet, document: list[int], small: RefineConfig, scope: str
) -> None:
    config = small.replace(reward="semantic", scope=scope, steps=1)
    similarity = Similarity("letters", lambda texts: [[*v, 1.0] for v in letters(texts)], spell)
    refiner = Refiner(tiny_model, document, config, similarity=similarity)
    (event,) = [quantum.event for quantum in refiner.run() if quantum.event is not None]
    assert 0 < event["reward_mean"] < 1
    with pytest.raises(ConfigError, match="--reward-encoder") as error:
        Refiner(tiny_model, document, config)
    assert error.value.field == "reward"


def test_focus_is_rewarded_by_it(tiny_model: DeltaNet, read_adapter: Adapter) -> None:
    config = RefineConfig.preset("focus", reward="semantic", lambda_rl=0.4, steps=1, positions=2)
    similarity = Similarity("letters", letters, spell)
    focus = Focus(tiny_model, read_adapter, [[5, 6]], config, similarity=similarity)
    list(focus.run())
    assert focus.results[0].reward_first is not None
    with pytest.raises(ConfigError, match="--reward-encoder"):
        Focus(tiny_model, read_adapter, [[5, 6]], config)


def test_requests_are_refused_where_the_server_has_none() -> None:
    method = {"reward": "semantic"}
    with pytest.raises(InvalidRequestError, match="--reward-encoder") as refusal:
        parse_method(method, preset="default", has_encoder=False)
    assert refusal.value.param == "method.reward"
    with pytest.raises(InvalidRequestError, match="--reward-encoder"):
        parse_focus({**method, "lambda_rl": 0.4}, has_encoder=False)
    assert parse_method(method, preset="default", has_encoder=True)["reward"] == "semantic"


def test_the_function_is_found_by_its_name() -> None:
    name = "imprint.adapters.similarity:load_encoder"  # any function will do
    assert load_encoder(name) is load_encoder
