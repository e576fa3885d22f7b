"""The client against a scripted transport: what it sends, how it waits, which errors it raises."""

from __future__ import annotations

import json

import httpx
import pytest

from imprint.server.client import (
    AnswerRequest,
    ApiError,
    BadReplyError,
    ClientError,
    ImprintClient,
    ServerUnreachableError,
)
from imprint.server.sse import parse_events

JOB = {"id": "adp_1", "object": "adaptation", "status": "queued"}


def refusal(status, code, *, retry_after=None):
    body = {"error": {"message": f"no: {code}", "type": "x", "param": None, "code": code}}
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json=body, headers=headers)


def sse(*records, done=True, first_id=1):
    lines = [f"id: {first_id + i}\ndata: {json.dumps(r)}\n\n" for i, r in enumerate(records)]
    text = ": keep-alive\n\n" + "".join(lines) + ("data: [DONE]\n\n" if done else "")
    return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})


class Script:
    """Replies in order; remembers requests and sleeps."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests = []
        self.slept_s = []

    def __call__(self, request):
        self.requests.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def client(self, **options):
        transport = httpx.MockTransport(self)
        return ImprintClient(
            "http://imprint", transport=transport, sleep=self.slept_s.append, **options
        )


def test_adapt_sends_only_what_was_given():
    script = Script(httpx.Response(202, json=JOB))
    with script.client() as client:
        job = client.adapt("a text", seed=3)
    assert (job.id, job.status, job.is_terminal) == ("adp_1", "queued", False)
    assert json.loads(script.requests[0].content) == {"document": "a text", "seed": 3}


def test_overload_is_waited_out_as_the_server_asks():
    script = Script(
        refusal(503, "queue_full", retry_after="7"),
        refusal(429, "rate_limited", retry_after="500"),
        httpx.Response(202, json=JOB),
    )
    assert script.client().adapt("a text").id == "adp_1"
    assert script.slept_s == [7.0, 120.0]


def test_waiting_ends_when_its_time_is_used_up():
    script = Script(*[refusal(503, "draining", retry_after="40") for _ in range(3)])
    with pytest.raises(ApiError, match="no: draining") as caught:
        script.client(max_wait_s=90).adapt("a text")
    assert (caught.value.code, caught.value.status) == ("draining", 503)
    assert script.slept_s == [40.0, 40.0]


@pytest.mark.parametrize(
    "reply",
    [
        refusal(400, "invalid_method", retry_after="1"),
        refusal(503, "worker_died"),
        refusal(503, "queue_full", retry_after="tomorrow"),
        refusal(503, "queue_full", retry_after="nan"),
    ],
)
def test_other_refusals_are_raised_at_once(reply):
    script = Script(reply)
    with pytest.raises(ApiError, match="no: "):
        script.client().adapt("a text")
    assert script.slept_s == []


def test_a_server_that_is_not_there_is_named():
    script = Script(httpx.ConnectError("refused"), httpx.ReadTimeout("slow"))
    client = script.client()
    assert not client.is_ready()
    with pytest.raises(ServerUnreachableError, match="http://imprint did not answer in time"):
        client.adaptation("adp_1")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (httpx.Response(200, text="<html>"), "not JSON"),
        (httpx.Response(200, json=[1]), "not a JSON object"),
        (httpx.Response(200, json={"hello": 1}), "not an adaptation"),
    ],
)
def test_replies_of_something_else_are_recognised(reply, message):
    with pytest.raises(BadReplyError, match=message):
        Script(reply).client().adaptation("adp_1")


def test_a_refusal_without_our_error_shape_still_says_its_status():
    with pytest.raises(ApiError, match="HTTP 502 Bad Gateway"):
        Script(httpx.Response(502, text="nginx")).client().adaptation("adp_1")


def test_addresses_must_be_http():
    with pytest.raises(ClientError, match="must start with http"):
        ImprintClient("localhost:8765")
    with pytest.raises(ClientError, match="cannot be read"):
        ImprintClient("http://[::1")


def test_a_proxy_of_the_environment_is_not_asked_for_a_local_server(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with ImprintClient("http://127.0.0.1:8765") as client:
        assert not client._http._mounts
    with ImprintClient("http://imprint.example") as client:
        assert client._http._mounts


def test_wait_follows_events_over_a_broken_connection():
    script = Script(
        sse({"kind": "progress", "data": {"step": 1}}, done=False),
        sse({"kind": "step", "data": {"step": 2}}, first_id=2),
        httpx.Response(200, json={**JOB, "status": "succeeded"}),
    )
    seen = []
    job = script.client().wait("adp_1", seen.append)
    assert job.status == "succeeded"
    assert [(e.id, e.kind, e.data) for e in seen] == [
        ("1", "progress", {"step": 1}),
        ("2", "step", {"step": 2}),
    ]
    assert script.requests[1].headers["Last-Event-ID"] == "1"


def test_wait_goes_on_where_it_was_when_the_stream_ends_before_the_job():
    script = Script(
        sse({"kind": "step", "data": {}}),
        httpx.Response(200, json={**JOB, "status": "running"}),
        sse(),
        httpx.Response(200, json={**JOB, "status": "failed"}),
    )
    seen = []
    assert script.client().wait("adp_1", seen.append).status == "failed"
    assert len(seen) == 1
    assert script.requests[2].headers["Last-Event-ID"] == "1"


def test_answers_stream_objects_and_raise_errors_in_mid_stream():
    request = AnswerRequest(questions=("who?",), document="a text", focus=False)
    error = {"error": {"message": "too late", "code": "deadline_exceeded"}}
    script = Script(sse({"object": "answer.delta", "text": "x"}, error))
    stream = script.client().stream_answer(request)
    assert next(stream)["text"] == "x"
    with pytest.raises(ApiError, match="too late") as caught:
        next(stream)
    assert caught.value.code == "deadline_exceeded"
    sent = json.loads(script.requests[0].content)
    assert sent == {"questions": ["who?"], "document": "a text", "focus": False, "stream": True}


def test_a_stream_that_stops_short_is_an_error():
    script = Script(sse({"object": "answer.delta"}, done=False))
    with pytest.raises(ServerUnreachableError, match="before it was complete"):
        list(script.client().stream_answer(AnswerRequest(questions=("q",), adaptation="adp_1")))


def test_an_answer_needs_exactly_one_source():
    with pytest.raises(ValueError, match="either a document"):
        AnswerRequest(questions=("q",))
    with pytest.raises(ValueError, match="either a document"):
        AnswerRequest(questions=("q",), document="d", adaptation="a")


def test_cancel_and_delete_use_their_routes():
    script = Script(httpx.Response(200, json=JOB), httpx.Response(204))
    client = script.client()
    client.cancel("adp_1")
    client.delete("adp_1")
    assert [(r.method, r.url.path) for r in script.requests] == [
        ("POST", "/v1/adaptations/adp_1/cancel"),
        ("DELETE", "/v1/adaptations/adp_1"),
    ]


def test_event_parsing_follows_the_standard():
    lines = [
        "retry: 5",
        "data: a",
        "data:b",
        "id: 4",
        "",
        ": note",
        "",
        "event: x",
        "data",
        "",
        "data: cut",
    ]
    events = list(parse_events(lines))
    assert [(e.data, e.id) for e in events] == [("a\nb", "4"), ("", "4")]
