"""`/v1/tokenize` and `/v1/detokenize`: vLLM's shapes, and the tokens that completions read."""

from typing import Any

import httpx
import pytest

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
LIMIT = 100
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_document_tokens": LIMIT})


async def tokenize(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/tokenize", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def detokenize(client: httpx.AsyncClient, tokens: list[int]) -> str:
    response = await client.post("/v1/detokenize", json={"tokens": tokens})
    assert response.status_code == 200, response.text
    return str(response.json()["prompt"])


async def test_there_and_back(client: httpx.AsyncClient) -> None:
    for text in ("Once", "", "naïve 日本 \N{SNOWMAN}\n"):
        reply = await tokenize(client, prompt=text)
        assert reply["count"] == len(reply["tokens"]) == len(text.encode())
        assert (reply["token_strs"], reply["max_model_len"]) == (None, LIMIT)
        assert await detokenize(client, reply["tokens"]) == text
    assert await detokenize(client, [0]) == ""  # a special token


async def test_tokens_as_text(client: httpx.AsyncClient) -> None:
    reply = await tokenize(client, prompt="a é", return_token_strs=True)
    assert reply["token_strs"] == ["a", " ", "bytes:\\xc3", "bytes:\\xa9"]


async def test_the_tokens_that_a_completion_reads(client: httpx.AsyncClient, pool: Any) -> None:
    said = {"messages": MESSAGES}
    for path, body in (("/v1/completions", {"prompt": "Once"}), ("/v1/chat/completions", said)):
        await client.post(path, json={"model": "tiny", **body})
        (prompt,) = pool.generates[-1].prompts
        assert (await tokenize(client, **body))["tokens"] == prompt.tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("tokenize", {}, 400, "invalid_request", None),
        ("tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "invalid_request", None),
        ("tokenize", {"messages": MESSAGES[:1]}, 400, "invalid_request", None),
        ("tokenize", {"prompt": "x", "echo": True}, 400, "unknown_parameter", "echo"),
        (
            *("tokenize", {"prompt": "x", "add_special_tokens": True}),
            *(400, "invalid_request", "add_special_tokens"),
        ),
        ("tokenize", {"prompt": "x" * (LIMIT + 1)}, 400, "context_length_exceeded", "prompt"),
        ("tokenize", {"prompt": "x", "model": "other"}, 404, "model_not_found", "model"),
        ("detokenize", {"tokens": [257]}, 400, "invalid_request", "tokens"),
        ("detokenize", {"tokens": [-1]}, 400, "invalid_request", "tokens.0"),
        ("detokenize", {"tokens": [1] * (LIMIT + 1)}, 400, "context_length_exceeded", "tokens"),
        ("detokenize", {"tokens": [1], "model": "other"}, 404, "model_not_found", "model"),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    response = await client.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
