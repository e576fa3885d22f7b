"""`/v1/completions` and `/v1/chat/completions`: the OpenAI shapes, and every parameter's effect."""

import json
from typing import Any

import httpx
import pytest

from imprint.server import messages

pytestmark = pytest.mark.anyio
COMPLETE = {"model": "tiny", "prompt": "Once"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Which number?"}]}
TEXT = " forty two \n"


async def post(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int = 200
) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply["error"] if status >= 400 else reply


async def complete(client: httpx.AsyncClient, status: int = 200, **changes: Any) -> dict[str, Any]:
    return await post(client, "/v1/completions", {**COMPLETE, **changes}, status)


async def chat(client: httpx.AsyncClient, status: int = 200, **changes: Any) -> dict[str, Any]:
    return await post(client, "/v1/chat/completions", {**CHAT, **changes}, status)


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def read(client: httpx.AsyncClient, **source: Any) -> str:
    """The id of a document's reading, ready to be asked."""
    body = {"questions": ["q"], **(source or {"document": "text"})}
    return str((await post(client, "/v1/answers", body))["adaptation"]["id"])


async def test_a_completion_in_the_openai_shape(client: httpx.AsyncClient, pool: Any) -> None:
    reply = (await client.post("/v1/completions", json={**COMPLETE, "prompt": ["a", "b"]})).json()
    assert (reply["object"], reply["model"]) == ("text_completion", "tiny")
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        (0, " forty two \n"),
        (1, " forty two \n"),
    ]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 8
    (generate,) = pool.generates
    assert (generate.adapter_id, generate.focus, generate.stop) == (None, None, [])
    assert (generate.max_tokens, generate.temperature) == (16, 1.0)
    await client.post("/v1/completions", json={**COMPLETE, "prompt": ["a", "b"]})
    assert pool.generates[1].prompts[0].seed != generate.prompts[0].seed
    for _ in range(2):
        await client.post("/v1/completions", json={**COMPLETE, "seed": 5})
    assert pool.generates[2].prompts[0].seed == pool.generates[3].prompts[0].seed == 5


async def test_a_completion_after_a_document(client: httpx.AsyncClient, pool: Any) -> None:
    id = await read(client)
    body = {**COMPLETE, "model": f"tiny:{id}"}
    reply = (await client.post("/v1/completions", json=body)).json()
    assert reply["model"] == f"tiny:{id}"
    assert pool.generates[-1].adapter_id == id
    pool.script = lambda work: [
        messages.RequestFailed(request_id=work.request_id, code="adapter_corrupt", message="x")
    ]
    for _ in range(2):
        response = await client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (410, "adapter_corrupt")


@pytest.mark.parametrize("usage", [False, True])
async def test_a_completion_streams(client: httpx.AsyncClient, usage: bool) -> None:
    body = {**COMPLETE, "stream": True, "stream_options": {"include_usage": usage}}
    response = await client.post("/v1/completions", json=body)
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in response.text.splitlines()
        if line.startswith("data: {")
    ]
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)
    assert all(("usage" in chunk) == usage for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " forty two \n"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_a_chat_completion_in_the_openai_shape(client: httpx.AsyncClient, pool: Any) -> None:
    reply = await chat(client, temperature=0, max_completion_tokens=7, seed=3)
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "forty two", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    (generate,) = pool.generates
    assert (generate.max_tokens, generate.temperature, generate.stop) == (7, 0.0, ["\n"])
    assert (generate.adapter_id, generate.focus, generate.prompts[0].seed) == (None, None, 3)


async def test_a_conversation_is_put_by_the_template(client: Any, pool: Any) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada", "refusal": None, "tool_calls": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}],
        },
    ]
    await chat(client, messages=conversation, stop=[])
    prompt = client.app.state.services.tokenizer.decode(pool.generates[0].prompts[0].tokens)
    asked = "\nQuestion: Who?\nAnswer: Ada\nQuestion: Why?\nAnswer:"
    assert prompt == f"\nBe brief.{asked}"
    assert pool.generates[0].stop == []


async def test_a_document_is_a_model(client: httpx.AsyncClient, pool: Any) -> None:
    document = (await post(client, "/v1/documents", {"text": "The code is 42."}, 201))["id"]
    model = f"tiny:{document}"
    error = await chat(client, 409, model=model)
    assert (error["code"], error["param"]) == ("adaptation_not_ready", "model")
    reading = await read(client, document_id=document)
    assert (await chat(client, model=model))["model"] == model
    assert pool.generates[-1].adapter_id == reading
    studied = await post(client, "/v1/adaptations", {"document_id": document}, 202)
    events = f"/v1/adaptations/{studied['id']}/events"
    await client.get(events, headers={"Accept": "text/event-stream"})
    await read(client, document_id=document)
    await complete(client, model=model)
    assert pool.generates[-1].adapter_id == studied["id"]
    await chat(client, model=model, focus={"steps": 2})
    assert pool.generates[-1].focus == {"steps": 2}
    assert (await chat(client, 400, focus=True))["param"] == "focus"
    assert (await chat(client, 404, model="tiny:doc_x"))["code"] == "document_not_found"


async def test_a_chat_completion_streams(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = await stream(client, "/v1/chat/completions", body)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "forty two"
        assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")


async def test_several_choices_count_their_prompt_once(client: Any, pool: Any) -> None:
    reply = await complete(client, prompt=["a", "b"], n=3, seed=10)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    prompts = pool.generates[0].prompts
    assert [prompt.seed for prompt in prompts] == list(range(10, 16))
    assert prompts[0].tokens == prompts[2].tokens != prompts[3].tokens
    assert reply["usage"]["completion_tokens"] == 6 * 4
    assert reply["usage"]["prompt_tokens"] == 2 * (3 + 5)
    assert (await complete(client, 400, n=65))["param"] == "n"
    assert (await complete(client, 400, prompt=["a"] * 33, n=2))["param"] == "n"


async def test_sampling_reaches_the_worker(client: httpx.AsyncClient, pool: Any) -> None:
    options = {"top_p": 0.5, "presence_penalty": 1.5, "frequency_penalty": -0.5, "temperature": 0.3}
    for ask, most in ((complete, {"logprobs": 2}), (chat, {"logprobs": True, "top_logprobs": 2})):
        await ask(client, **options, **most)
        generate = pool.generates[-1]
        assert {name: getattr(generate, name) for name in options} == options
        assert generate.logprobs == 2


async def test_prompts_may_be_tokens(client: httpx.AsyncClient, pool: Any) -> None:
    await complete(client, prompt=[3, 4, 5])
    assert [prompt.tokens for prompt in pool.generates[-1].prompts] == [[3, 4, 5]]
    await complete(client, prompt=[[3], [4, 5]])
    assert [prompt.tokens for prompt in pool.generates[-1].prompts] == [[3], [4, 5]]
    assert (await complete(client, 400, prompt=[[3], [99999]]))["param"] == "prompt.1"


async def test_logprobs_go_with_their_text(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == list(range(len(TEXT)))
    assert logprobs["tokens"] == ["!"] * len(TEXT)
    assert logprobs["token_logprobs"] == [-0.5] * len(TEXT)
    assert logprobs["top_logprobs"][0] == {"!": -0.5, '"': -1.0, "#": -2.0}
    content = (await chat(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert content[0] == {"token": "!", "logprob": -0.5, "bytes": [33], "top_logprobs": []}
    assert len(content) == len(" forty two"), "not those of the whitespace behind the reply"
    chunks = await stream(client, "/v1/chat/completions", {**CHAT, "logprobs": True})
    told = [c["choices"][0]["logprobs"] for c in chunks]
    assert [entry for part in told if part for entry in part["content"]] == content


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", 2), ("echo", True), ("suffix", "x"), ("logit_bias", {"1": 1}), ("user", "me")],
)
async def test_what_is_not_served_is_refused_by_name(
    client: httpx.AsyncClient, name: str, value: Any
) -> None:
    for ask in (complete, chat):
        error = await ask(client, 400, **{name: value})
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert (await ask(client, 400, nonsense=1))["code"] == "unknown_parameter"


async def test_what_asks_for_nothing_is_left_out(client: httpx.AsyncClient) -> None:
    nothing = {
        "echo": False,
        "logit_bias": {},
        "best_of": 1,
        "tools": [],
        "user": None,
        "stop": None,
    }
    for ask in (complete, chat):
        await ask(client, **nothing)
        assert (await ask(client, 400, best_of=True))["param"] == "best_of"


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "me"}]},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"n": 0},
        {"stream_options": {"include_usage": True}},
    ],
)
async def test_bad_conversations(client: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    assert (await chat(client, 400, **changes))["type"] == "invalid_request_error"
