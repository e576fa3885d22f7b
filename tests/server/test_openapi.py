"""The OpenAPI document says everything: each route, each answer, an example of each shape."""

from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from imprint.server.app import create_app
from imprint.server.config import Settings
from imprint.server.errors import STATUS_CODES
from imprint.server.keys import KeyRing
from imprint.server.openapi import SCHEME, is_open, operations
from imprint.server.routes.described import REASONS

NO_BODY_SHAPE = {"/metrics", "/v1/adaptations/{id}/adapter"}  # text, and a file


@pytest.fixture(scope="module")
def app() -> FastAPI:
    keys = KeyRing.parse("alice:sk-alice-0123456789")
    return create_app(Settings(api_keys=keys), pool=None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def bodies(operation: dict[str, Any]) -> list[dict[str, Any]]:
    content = operation.get("requestBody", {}).get("content", {})
    return [content[kind]["schema"] for kind in content if kind == "application/json"]


def test_every_route_is_described(app: FastAPI, document: dict[str, Any]) -> None:
    for route in iter_route_contexts(app.routes):
        path = (route.path or "").replace(":path}", "}")
        if is_open(path) and not path.startswith("/health"):
            continue
        for method in (route.methods or set()) - {"HEAD"}:
            assert method.lower() in document["paths"].get(path, {}), (method, path)


def test_every_operation_is_complete(document: dict[str, Any]) -> None:
    for path, operation in operations(document):
        assert operation["description"], path
        responses = operation["responses"]
        assert "422" not in responses, path
        successes = [status for status in responses if status < "400"]
        assert successes, path
        for status in successes:
            (shape, *_) = responses[status]["content"].values()
            assert path in NO_BODY_SHAPE or "$ref" in shape["schema"], path
        needed = {"400", "500", "503"} | (set() if is_open(path) else {"401", "429"})
        assert needed <= set(responses), path
        if "{" in path:
            assert "404" in responses, path
        assert operation.get("security") == (None if is_open(path) else [{SCHEME: []}]), path


def test_without_keys_a_key_is_not_asked_for() -> None:
    document = create_app(Settings(), pool=None).openapi()  # type: ignore[arg-type]
    for path, operation in operations(document):
        if not is_open(path):
            assert operation["security"] == [{SCHEME: []}, {}]


def test_every_error_is_documented(document: dict[str, Any]) -> None:
    responses = document["components"]["responses"]
    assert set(responses) == {f"Error{status}" for status in REASONS}
    assert set(REASONS) <= set(STATUS_CODES)


def validator(document: dict[str, Any], name: str) -> Any:
    components = {"components": {"schemas": document["components"]["schemas"]}}
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", **components})


def shapes(document: dict[str, Any]) -> set[str]:
    """Names of the shapes that a body or an answer has as a whole."""
    found = {"ErrorReply"}
    for _, operation in operations(document):
        schemas = bodies(operation)
        for status, response in operation["responses"].items():
            if status < "400":
                schemas += [content["schema"] for content in response["content"].values()]
        found.update(s["$ref"].rpartition("/")[2] for s in schemas if "$ref" in s)
    return found


def test_every_shape_has_an_example_that_fits(document: dict[str, Any]) -> None:
    for name in sorted(shapes(document)):
        examples = document["components"]["schemas"][name].get("examples")
        assert examples, f"give {name} an example in server/api_examples.py"
        for example in examples:
            errors = [error.message for error in validator(document, name).iter_errors(example)]
            assert errors == [], name
    for response in document["components"]["responses"].values():
        example = response["content"]["application/json"]["example"]
        assert validator(document, "ErrorReply").is_valid(example)


@pytest.mark.anyio
async def test_answers_have_the_shapes_that_are_promised(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    def check(name: str, response: httpx.Response) -> Any:
        assert response.is_success, response.text
        errors = [e.message for e in validator(document, name).iter_errors(response.json())]
        assert errors == [], name
        return response.json()

    stored = check("Document", await client.post("/v1/documents", json={"text": "x" * 20}))
    path = f"/v1/documents/{stored['id']}"
    check("Document", await client.get(path))
    check("DocumentContent", await client.get(f"{path}/content"))
    check("Page_Document_", await client.get("/v1/documents"))
    asked = {"document_id": stored["id"], "questions": ["what?"]}
    answers = check("Answers", await client.post("/v1/answers", json=asked))
    job = f"/v1/adaptations/{answers['adaptation']['id']}"
    check("Adaptation", await client.get(job))
    check("Page_Adaptation_", await client.get("/v1/adaptations"))
    check("Page_AdaptationEvent_", await client.get(f"{job}/events"))
    prompt = {"model": "tiny", "prompt": "x"}
    check("Completion", await client.post("/v1/completions", json=prompt))
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    check("ChatCompletion", await client.post("/v1/chat/completions", json=chat))
    check("Tokenized", await client.post("/v1/tokenize", json={"prompt": "x"}))
    check("Detokenized", await client.post("/v1/detokenize", json={"tokens": [1]}))
    check("Page_Model_", await client.get("/v1/models"))
    check("Model", await client.get("/v1/models/tiny"))
    check("Health", await client.get("/health"))
    check("Version", await client.get("/version"))
    check("Deleted", await client.delete(job))
    check("Deleted", await client.delete(path))
    check("ErrorReply", httpx.Response(200, content=(await client.get(path)).content))


def test_parameters_in_paths_have_examples(document: dict[str, Any]) -> None:
    for path, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path":
                assert parameter["example"], path
