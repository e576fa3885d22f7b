"""Bodies: unknown options are refused by name, methods are written out."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from imprint.adapters.config import RefineConfig
from imprint.server.errors import InvalidRequestError
from imprint.server.openai_schemas import CreateChatCompletion, CreateCompletion
from imprint.server.schemas import (
    CreateAdaptation,
    CreateAnswers,
    parse_focus,
    parse_method,
)

GOOD: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CreateAdaptation, {"document": "text"}),
    (CreateAnswers, {"document": "text", "questions": ["what?"]}),
    (CreateCompletion, {"model": "tiny", "prompt": "Once"}),
    (CreateChatCompletion, {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}),
]


@pytest.mark.parametrize(("kind", "body"), GOOD)
def test_an_unknown_option_is_refused_by_name(kind: type[BaseModel], body: dict[str, Any]) -> None:
    kind.model_validate(body)
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({**body, "temperatur": 1})
    assert caught.value.errors()[0]["loc"] == ("temperatur",)


@pytest.mark.parametrize(
    "body",
    [
        {"questions": ["a"]},
        {"questions": ["a"], "document": "x", "adaptation": "adp_1"},
        {"questions": ["a"], "adaptation": "adp_1", "method": {"type": "read"}},
        {"questions": [], "document": "x"},
        {"questions": [""], "document": "x"},
        {"questions": ["a"], "document": ""},
        {"questions": ["a"], "document": "x", "temperature": float("nan")},
        {"questions": ["a"], "document": "x", "temperature": -1},
        {"questions": ["a"], "document": "x", "max_tokens": True},
        {"questions": ["a"], "document": "x", "seed": "1"},
        {"questions": ["a"], "document": "x", "stop": ["a"] * 5},
        {"questions": ["a"], "document": "x\ud800"},
    ],
)
def test_bad_answers_bodies(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CreateAnswers.model_validate(body)


def test_stop_may_be_one_string() -> None:
    body = {"document": "x", "questions": ["a"]}
    assert CreateAnswers.model_validate(body).stops == ["\n"]
    assert CreateAnswers.model_validate({**body, "stop": "."}).stops == ["."]
    assert CreateAnswers.model_validate({**body, "stop": []}).stops == []
    completion = {"model": "m", "prompt": ["a", "b"]}
    assert CreateCompletion.model_validate(completion).stops == []
    assert CreateCompletion.model_validate(completion).prompts == ["a", "b"]


def test_stream_options_need_stream() -> None:
    body = {"model": "m", "prompt": "a", "stream_options": {"include_usage": True}}
    with pytest.raises(ValidationError):
        CreateCompletion.model_validate(body)
    assert CreateCompletion.model_validate({**body, "stream": True}).stream


def test_equal_methods_look_equal() -> None:
    spelled = {"type": "refine", "preset": "default", "steps": RefineConfig().steps}
    assert parse_method(None, preset="default") == parse_method(spelled, preset="fast")
    assert parse_method(None, preset="fast") != parse_method(None, preset="default")
    assert parse_method({"type": "read"}, preset="fast") == {"type": "read"}


@pytest.mark.parametrize(
    ("method", "param"),
    [
        ({"type": "magic"}, "method.type"),
        ({"type": ["read"]}, "method.type"),
        ({"type": "read", "steps": 3}, "method.steps"),
        ({"stepz": 3}, "method.stepz"),
        ({"steps": "many"}, "method.steps"),
        ({"preset": "slow"}, "method.preset"),
    ],
)
def test_a_bad_method_names_its_field(method: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_method(method, preset="default")
    assert caught.value.param == param


def test_focus_overrides_are_checked() -> None:
    assert parse_focus(True, has_encoder=False) == {}
    assert parse_focus(False, has_encoder=False) is None
    assert parse_focus({"steps": 2}, has_encoder=False) == {"steps": 2}


@pytest.mark.parametrize(
    ("focus", "param"),
    [
        ({"stepz": 2}, "focus.stepz"),
        # judged by what runs, which is the preset focus: no rollouts, one scope
        ({"lambda_ntp": 0}, "focus.lambda_rl"),
        ({"scope": "lora"}, "focus.scope"),
        ({"reward": "ngram"}, "focus.reward"),
    ],
)
def test_focus_that_cannot_run_or_would_change_nothing_is_refused(
    focus: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_focus(focus, has_encoder=False)
    assert caught.value.param == param


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # as a busy machine makes any of them
@given(st.dictionaries(st.sampled_from(["type", "preset", "steps", "name", "betas"]), json_values))
def test_any_method_is_understood_or_refused(method: dict[str, Any]) -> None:
    with suppress(InvalidRequestError):  # and nothing else
        assert parse_method(method, preset="default")["type"] in ("read", "refine")
