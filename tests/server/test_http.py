"""What holds for every route: one error shape, request ids, body limits, nothing secret in logs."""

import asyncio
import json
import logging
import re
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
JSON = {"Content-Type": "application/json"}
ADAPT = "/v1/adaptations"


def check_shape(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["code"] == code
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "message", "param"),
    [
        ("GET", "/nope", b"", "not_found", "openapi.json", None),
        ("GET", f"{ADAPT}?after=x", b"", "adaptation_not_found", "no adaptation 'x'", "after"),
        ("GET", "/v1/models?after=tiny:x", b"", "adaptation_not_found", "'x'", "after"),
        ("PUT", ADAPT, b"", "method_not_allowed", "this path takes GET, POST", None),
        ("POST", ADAPT, b"[]", "invalid_request", "must be a JSON object", None),
        ("POST", ADAPT, b"[" * 100_000, "invalid_json", "not JSON", None),
        ("POST", ADAPT, b'{"document": "\xff"}', "invalid_json", "not JSON in UTF-8", None),
        ("POST", ADAPT, b'{"seed": %s}' % (b"9" * 5000), "invalid_json", "digits", None),
        ("POST", ADAPT, b'{"document": "x", "method": {"steps": %s}}' % (b"9" * 400),
         "invalid_request", "steps is too large", "method.steps"),
        ("POST", "/v1/answers", b'{"adaptation": "x", "questions": ["q"]}', "adaptation_not_found",
         "'x'", "adaptation"),
        ("POST", "/v1/completions", b'{"model": "tiny:x", "prompt": "p"}', "adaptation_not_found",
         "'x'", "model"),
    ],
)  # fmt: skip
async def test_a_refusal_says_what_is_wrong_and_where(
    client: Any, method: str, path: str, body: bytes, code: str, message: str, param: str | None
) -> None:
    error = (await client.request(method, path, content=body, headers=JSON)).json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert message in error["message"]


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}


async def test_a_wrong_method_is_told_the_right_ones(client: Any) -> None:
    """Over every path: `Allow` is what is allowed, and nothing that it names is refused."""
    methods: dict[str, set[str]] = {}
    for route in iter_route_contexts(client.app.routes):
        methods.setdefault(route.path or "", set()).update(route.methods or ())
    assert methods["/v1/documents/{id}"] == {"GET", "DELETE"}  # of two routes
    for path, allowed in methods.items():
        for method in METHODS:
            response = await client.request(method, re.sub(r"\{.*?\}", "x", path))
            assert (response.status_code == 405) == (method not in allowed), (method, path)
            if method in allowed:
                continue
            assert response.headers["allow"].split(", ") == sorted(allowed), (method, path)
            if method != "HEAD":
                assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("GET", "/nope", None, {}, 404, "not_found"),
        ("GET", "/v1/adaptations/", None, {}, 404, "not_found"),
        ("GET", "/v1/adaptations/adp_x", None, {}, 404, "adaptation_not_found"),
        ("GET", "/v1/adaptations/adp_x/events", None, {}, 404, "adaptation_not_found"),
        ("POST", "/v1/adaptations/adp_x/cancel", None, {}, 404, "adaptation_not_found"),
        ("DELETE", "/v1/adaptations/adp_x", None, {}, 404, "adaptation_not_found"),
        ("GET", "/v1/adaptations?after=adp_x", None, {}, 404, "adaptation_not_found"),
        ("GET", "/v1/adaptations?limit=0", None, {}, 400, "invalid_request"),
        ("GET", "/v1/models/other", None, {}, 404, "model_not_found"),
        ("GET", "/v1/models/tiny:adp_x", None, {}, 404, "adaptation_not_found"),
        ("PUT", ADAPT, "{}", JSON, 405, "method_not_allowed"),
        ("DELETE", "/health", None, {}, 405, "method_not_allowed"),
        ("POST", ADAPT, "document=x", {}, 415, "unsupported_media_type"),
        ("POST", ADAPT, "{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", ADAPT, "{", JSON, 400, "invalid_json"),
        ("POST", ADAPT, "[" * 100_000, JSON, 400, "invalid_json"),
        ("POST", ADAPT, b"\xff\xfe", JSON, 400, "invalid_json"),
        ("POST", ADAPT, b'{"document": "\x80"}', JSON, 400, "invalid_json"),
        ("POST", ADAPT, "[]", JSON, 400, "invalid_request"),
        ("POST", ADAPT, "", JSON, 400, "missing_parameter"),
        ("POST", ADAPT, "{}", JSON, 400, "missing_parameter"),
        ("POST", ADAPT, '{"document": "x", "modle": 1}', JSON, 400, "unknown_parameter"),
        ("POST", ADAPT, '{"document": "\\ud800"}', JSON, 400, "invalid_request"),
        ("POST", ADAPT, '{"document": "x", "\\ud800": 1}', JSON, 400, "invalid_request"),
        ("POST", ADAPT, '{"document": "x", "seed": 1e400}', JSON, 400, "invalid_request"),
        ("POST", ADAPT, '{"document": "x", "seed": NaN}', JSON, 400, "invalid_request"),
        ("POST", ADAPT, '{"document": "x", "model": "y"}', JSON, 404, "model_not_found"),
        ("POST", "/v1/answers", '{"questions": ["a"]}', JSON, 400, "invalid_request"),
        ("POST", "/v1/completions", '{"model":"m","prompt":"x"}', JSON, 404, "model_not_found"),
    ],
)
async def test_one_shape_on_every_status(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    response = await client.request(method, path, content=body, headers=headers)
    check_shape(response, status, code)


async def test_a_crash_has_the_shape_too(
    client: httpx.AsyncClient, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pool.submit = None  # a bug
    body = {"model": "tiny", "prompt": "x"}
    response = await client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    error = check_shape(response, 500, "internal_error")
    assert error["type"] == "server_error"
    assert "NoneType" not in error["message"]
    assert response.headers["x-request-id"] == "mine"
    text = (await client.get("/metrics")).text
    assert 'route="/v1/completions",status="500"' in text


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("", False)])
async def test_request_id_is_echoed(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    headers = (await client.get("/version", headers={"X-Request-Id": given})).headers
    assert (headers["x-request-id"] == given) == kept


async def chunks(total: int, size: int = 512) -> Any:
    for _ in range(total // size):
        yield b" " * size


async def test_long_bodies_are_refused(serve: Any, settings: Settings, pool: Any) -> None:
    small = settings.model_copy(update={"max_body_bytes": 4096})
    async with serve(small, pool) as client:
        declared = await client.post(ADAPT, content=b" " * 5000, headers=JSON)
        check_shape(declared, 413, "body_too_large")
        chunked = await client.post(ADAPT, content=chunks(8192), headers=JSON)
        check_shape(chunked, 413, "body_too_large")
        fits = json.dumps({"document": "x" * 3000})
        assert (await client.post(ADAPT, content=fits, headers=JSON)).status_code == 202


async def test_a_long_body_is_refused_before_it_is_sent(
    serve: Any, settings: Settings, pool: Any
) -> None:
    async with serve(settings, pool) as client:
        port = client.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/adaptations HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n{"
        )
        head = await asyncio.wait_for(reader.readline(), 5)
        assert head.startswith(b"HTTP/1.1 413")
        writer.close()


async def test_documents_are_bounded_in_tokens(serve: Any, settings: Settings, pool: Any) -> None:
    small = settings.model_copy(update={"max_document_tokens": 50})
    async with serve(small, pool) as client:
        response = await client.post(ADAPT, json={"document": "x" * 51})
        check_shape(response, 413, "document_too_large")
        asked = {"document": "x", "questions": ["y" * 60]}
        response = await client.post("/v1/answers", json=asked)
        check_shape(response, 400, "context_length_exceeded")
        assert response.json()["error"]["param"] == "questions.0"


async def test_no_document_text_in_logs_events_or_metrics(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asked = {"document": "canarydoc " * 20, "questions": ["canaryquestion?"]}
    reply = (await client.post("/v1/answers", json=asked)).json()
    id = reply["adaptation"]["id"]
    await client.post("/v1/answers", json={"document": "canarydoc", "questions": "canaryquestion"})
    text = (await client.get("/metrics")).text
    text += (await client.get(f"/v1/adaptations/{id}/events")).text
    text += (await client.get(f"/v1/adaptations/{id}")).text
    text += caplog.text
    assert "/v1/answers 200" in text
    assert "canary" not in text
    assert id not in (await client.get("/metrics")).text


async def test_health(client: httpx.AsyncClient, pool: Any) -> None:
    assert (await client.get("/health/live")).json() == {"status": "live"}
    assert (await client.get("/health/ready")).json() == {"status": "ready"}
    pool.ready = False
    refused = await client.get("/health/ready")
    check_shape(refused, 503, "not_ready")
    assert refused.headers["retry-after"] == "1"
    pool.worker.restarts["unusable_model"] = 1
    check_shape(await client.get("/health/ready"), 503, "unusable_model")
    health = (await client.get("/health")).json()
    assert (health["status"], health["workers"][0]["up"]) == ("not_ready", True)
    assert (await client.get("/version")).json()["model"] == "tiny"


async def test_models(client: httpx.AsyncClient) -> None:
    created = await client.post(ADAPT, json={"document": "hello"})
    id = created.json()["id"]
    await client.get(f"{ADAPT}/{id}/events", headers={"Accept": "text/event-stream"})
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in listed] == [
        ("tiny", None),
        (f"tiny:{id}", "tiny"),
    ]
    assert (await client.get(f"/v1/models/tiny:{id}")).json() == listed[1]
    assert (await client.get("/v1/models/tiny")).json() == listed[0]


async def test_models_come_in_pages(client: httpx.AsyncClient) -> None:
    for number in range(3):
        body = {"document": f"text {number}", "questions": ["q"]}
        assert (await client.post("/v1/answers", json=body)).status_code == 200
    names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert len(names) == 4
    for limit in (1, 2, 3, 4):
        seen: list[str] = []
        params: dict[str, Any] = {"limit": limit}
        while True:
            page = (await client.get("/v1/models", params=params)).json()
            got = [card["id"] for card in page["data"]]
            assert 1 <= len(got) <= limit
            assert (page["first_id"], page["last_id"]) == (got[0], got[-1])
            seen += got
            params["after"] = page["last_id"]
            if not page["has_more"]:
                break
        assert seen == names
    for after, code in (("other", "model_not_found"), ("tiny:adp_x", "adaptation_not_found")):
        refused = await client.get("/v1/models", params={"after": after})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, code)
    assert (await client.get("/v1/models", params={"limit": 1001})).status_code == 400


async def test_everything_new_is_refused_while_draining(client: Any) -> None:
    client.app.state.services.jobs.drain()
    for path, body in (
        (ADAPT, {"document": "x"}),
        ("/v1/answers", {"document": "x", "questions": ["y"]}),
        ("/v1/completions", {"model": "tiny", "prompt": "x"}),
    ):
        response = await client.post(path, json=body)
        check_shape(response, 503, "draining")
        assert 1 <= int(response.headers["retry-after"]) <= 120
    check_shape(await client.get("/health/ready"), 503, "draining")
    assert (await client.get("/health/live")).status_code == 200
    assert (await client.get("/health")).json()["status"] == "draining"


async def test_openapi_names_every_route(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/adaptations", "/v1/answers", "/v1/completions", "/metrics"} <= set(paths)
