"""Programs written for OpenAI's API against a live server: the `openai` package, `litellm`, `curl`.

The server is a real one with a real worker on a random tiny model: what it says is noise, but
greedy noise, so that a stream must add up to the whole reply.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the code?"},
]
SAMPLING: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "stop": ["never"]}


@pytest.fixture(scope="module")
def url(keyed_live: Any) -> str:
    return str(keyed_live.http.base_url).rstrip("/")


@pytest.fixture(scope="module")
def model(url: str, keyed_live: Any) -> str:
    """The model's name after a document that was read."""
    headers = {"Authorization": f"Bearer {keyed_live.key}"}
    body = {"document": "The code is 4711.", "questions": ["q"], "focus": False}
    body |= {"method": {"type": "read"}, "max_tokens": 1}
    reply = httpx.post(f"{url}/v1/answers", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return f"tiny:{reply.json()['adaptation']['id']}"


@pytest.fixture(scope="module")
def client(url: str, keyed_live: Any) -> Iterator[openai.OpenAI]:
    key = keyed_live.key
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


def test_openai_lists_models(client: openai.OpenAI, model: str) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", model]
    assert client.models.retrieve(model).owned_by == "imprint"


@pytest.mark.parametrize("adapted", [False, True])
def test_openai_chats(client: openai.OpenAI, model: str, adapted: bool) -> None:
    asked: dict[str, Any] = {"model": model if adapted else "tiny", "messages": MESSAGES}
    asked |= SAMPLING
    reply = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    (choice,) = reply.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 6
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [part.delta.content or "" for chunk in chunks for part in chunk.choices]
    assert "".join(pieces) == choice.message.content
    assert chunks[-1].usage == reply.usage


def test_openai_completes(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": ["Once", "Twice"], **SAMPLING}
    reply = client.completions.create(**asked, n=2, logprobs=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == reply.choices[1].text
    assert len(reply.choices[0].logprobs.token_logprobs) == 6
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [reply.choices[0].text, reply.choices[2].text]


def test_openai_understands_errors(client: openai.OpenAI, model: str) -> None:
    chat = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        chat(model="other", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unsupported:
        chat(model=model, messages=MESSAGES, logit_bias={"1": 5})
    assert (unsupported.value.code, unsupported.value.param) == (
        "unsupported_parameter",
        "logit_bias",
    )
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="sk-nobody-0123456789").models.list()
    assert stranger.value.code == "invalid_api_key"


LITELLM = """
import json, sys

refused = []

def only_here(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0]
        if host not in ("127.0.0.1", "localhost", "::1"):
            refused.append(str(host))
            raise OSError(f"no network in tests: {host}")

sys.addaudithook(only_here)
import litellm

url, key, model, asked = json.loads(sys.stdin.read())
place = {"api_base": url + "/v1", "api_key": key, "num_retries": 0}
whole = litellm.completion(model="openai/" + model, **asked, **place)
stream = litellm.completion(model="openai/" + model, stream=True, **asked, **place)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
try:
    litellm.completion(model="openai/other", **asked, **place)
    error = ""
except litellm.NotFoundError as failed:
    error = str(failed)
print(json.dumps([whole.choices[0].message.content, "".join(pieces), error, refused]))
"""


def test_litellm(url: str, model: str, keyed_live: Any, client: openai.OpenAI) -> None:
    asked = {"messages": MESSAGES, **SAMPLING}
    ran = subprocess.run(
        [sys.executable, "-c", LITELLM],
        input=json.dumps([url, keyed_live.key, model, asked]),
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    whole, streamed, error, refused = json.loads(ran.stdout.splitlines()[-1])
    said = client.chat.completions.create(model=model, **asked)
    assert whole == streamed == said.choices[0].message.content
    assert "no model 'other'" in error
    assert refused == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str, model: str, keyed_live: Any) -> None:
    def curl(path: str, body: dict[str, Any]) -> str:
        command = ["curl", "--silent", "--show-error", "--no-buffer", f"{url}{path}"]
        command += ["--header", f"Authorization: Bearer {keyed_live.key}", "--data", "@-"]
        command += ["--header", "Content-Type: application/json", "--noproxy", "*"]
        sent = json.dumps(body)
        return subprocess.run(
            command, input=sent, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    asked = {"model": model, "messages": MESSAGES, **SAMPLING}
    whole = json.loads(curl("/v1/chat/completions", asked))["choices"][0]["message"]["content"]
    lines = curl("/v1/chat/completions", {**asked, "stream": True}).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == whole
    error = json.loads(curl("/v1/chat/completions", {**asked, "model": "other"}))["error"]
    assert error["code"] == "model_not_found"
