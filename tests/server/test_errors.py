"""The one error shape."""

import json

import pytest

from imprint.server.errors import (
    ConflictError,
    GoneError,
    ImprintError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TooLargeError,
    WorkFailedError,
    clip,
    validation_error,
)


@pytest.mark.parametrize(
    "kind", [InvalidRequestError, NotFoundError, ConflictError, GoneError, TooLargeError]
)
def test_one_shape(kind: type[ImprintError]) -> None:
    error = kind("no", param="a.b")
    assert error.body() == {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "a.b",
            "code": kind.code,
        }
    }
    assert error.headers() == {}


@pytest.mark.parametrize(("asked_s", "header"), [(0, "1"), (2.4, "2"), (500, "120")])
def test_retry_after_is_bounded(asked_s: float, header: str) -> None:
    assert OverloadedError("busy", retry_after_s=asked_s).headers() == {"Retry-After": header}


@pytest.mark.parametrize(
    ("code", "status", "retried"),
    [
        ("queue_full", 503, True),
        ("worker_died", 503, True),
        ("context_length_exceeded", 400, False),
        ("adapter_not_found", 410, False),
        ("deadline_exceeded", 504, False),
        ("something_new", 500, False),
    ],
)
def test_worker_codes_have_a_status(code: str, status: int, retried: bool) -> None:
    error = WorkFailedError(code, "no")
    assert (error.status, error.code) == (status, code)
    assert ("Retry-After" in error.headers()) == retried
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert error.body()["error"]["type"] == kind


def test_inputs_are_cut_and_encodable() -> None:
    assert len(clip("x" * 1000)) == 200
    assert clip("\ud800") == "?"
    assert clip(float("inf")) == "inf"


def test_at_most_ten_validation_errors() -> None:
    errors = [
        {"type": "int_type", "loc": ("body", "a", i), "msg": "no", "input": "y" * 1000}
        for i in range(15)
    ]
    body = validation_error(errors).body()["error"]
    assert body["param"] == "a.0"
    assert body["message"].count("a.") == 10
    assert body["message"].endswith("and 5 more")
    assert len(body["message"]) < 10 * 300
    json.dumps(body)
