"""`/v1/answers`: adapt, ask, stream, and let go of everything when the client does."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from imprint.server import messages
from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
PATH = "/v1/answers"
ASK = {"document": "The code is 42.", "questions": ["What is the code?", "Why?"]}


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the server is about to do."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def ask(client: httpx.AsyncClient, status: int = 200, **changes: Any) -> dict[str, Any]:
    body = {name: value for name, value in {**ASK, **changes}.items() if value is not None}
    response = await client.post(PATH, json=body)
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply["error"] if status >= 400 else reply


async def ask_streaming(client: httpx.AsyncClient, **changes: Any) -> list[dict[str, Any]]:
    response = await client.post(PATH, json={**ASK, "stream": True, **changes})
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def metric(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    found = [line for line in text.splitlines() if line.startswith(f"imprint_{name} ")]
    return float(found[0].split()[-1]) if found else 0.0


async def assert_idle(client: httpx.AsyncClient) -> None:
    health = (await client.get("/health")).json()
    assert (health["adaptations"], health["requests"]) == (0, 0)
    for kind in ("answer", "completion", "adaptation"):
        for state in ("running", "waiting"):
            assert await metric(client, f'requests_{state}{{kind="{kind}"}}') == 0


def fail(id: str, code: str) -> messages.RequestFailed:
    return messages.RequestFailed(request_id=id, code=code, message="it is so")


async def test_a_document_is_read_then_focused(client: httpx.AsyncClient, pool: Any) -> None:
    reply = await ask(client)
    assert reply["object"] == "answers"
    assert [answer["question"] for answer in reply["answers"]] == ASK["questions"]
    for index, answer in enumerate(reply["answers"]):
        assert (answer["index"], answer["answer"]) == (index, "forty two")
        assert (answer["adapted"], answer["focus"]["steps"]) == (True, 4)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert reply["usage"]["total_tokens"] == 24
    (adapt,), (generate,) = pool.adapts, pool.generates
    assert reply["adaptation"]["id"] == adapt.adaptation_id == generate.adapter_id
    assert reply["adaptation"]["num_tokens"] == len(ASK["document"])
    assert adapt.method == {"type": "read"}
    assert (generate.focus, generate.stop, generate.temperature) == ({}, ["\n"], 0.0)
    assert [prompt.seed for prompt in generate.prompts] == [0, 1]
    assert 0 < generate.timeout_s <= 600
    await assert_idle(client)
    assert await metric(client, 'requests_total{kind="answer",outcome="succeeded"}') == 1
    assert await metric(client, "time_to_first_token_seconds_count") == 2


async def test_a_document_is_read_once(client: httpx.AsyncClient, pool: Any) -> None:
    first, second = await asyncio.gather(ask(client), ask(client, seed=9))
    third = await ask(client, adaptation=first["adaptation"]["id"], document=None)
    assert len(pool.adapts) == 1
    assert len({reply["adaptation"]["id"] for reply in (first, second, third)}) == 1


@pytest.mark.parametrize(
    ("changes", "kind", "focus"),
    [
        ({"focus": False}, "refine", None),
        ({"focus": {"steps": 2}}, "read", {"steps": 2}),
        ({"method": {"preset": "fast"}}, "refine", {}),
        ({"focus": False, "method": {"type": "read"}}, "read", None),
    ],
)
async def test_focus_and_method(
    client: httpx.AsyncClient, pool: Any, changes: dict[str, Any], kind: str, focus: Any
) -> None:
    await ask(client, **changes)
    assert pool.adapts[0].method["type"] == kind
    assert pool.generates[0].focus == focus


async def test_a_stream_tells_the_same_story(client: httpx.AsyncClient, pool: Any) -> None:
    events = await ask_streaming(client)
    whole = events[-1]
    assert whole["object"] == "answers"
    for index in (0, 1):
        deltas = [
            event["text"]
            for event in events
            if event["object"] == "answer.delta" and event["index"] == index
        ]
        assert "".join(deltas) == whole["answers"][index]["answer"] == "forty two"
    done = [event for event in events if event["object"] == "answer.done"]
    assert [{k: v for k, v in event.items() if k != "object"} for event in done] == whole["answers"]
    phases = [event["phase"] for event in events if event["object"] == "answer.progress"]
    assert phases[-1] == "focus"
    again = await ask(client)
    for reply in (whole, again):  # a second question comes later, and is another use
        del reply["id"], reply["created_at"]
        del reply["adaptation"]["used_at"], reply["adaptation"]["expires_at"]
    assert again == whole


async def test_held_back_text_belongs_to_the_answer(client: httpx.AsyncClient, pool: Any) -> None:
    await ask(client)

    def script(work: messages.Generate) -> list[Any]:
        id = work.request_id
        delta = messages.TokenDelta(
            request_id=id, sequence_id="0", index=0, token_id=1, text="a b "
        )
        end = messages.SequenceDone(
            request_id=id, sequence_id="0", finish_reason="length", text=" c "
        )
        return [delta, end]

    pool.script = script
    reply = await ask(client, questions=["q"])
    assert reply["answers"][0]["answer"] == "a b  c"


async def test_wrong_requests(client: httpx.AsyncClient, pool: Any) -> None:
    assert (await ask(client, 400, max_tokens=10**6))["param"] == "max_tokens"
    assert (await ask(client, 400, questions=["q"] * 65))["param"] == "questions"
    assert (await ask(client, 400, focus={"stepz": 1}))["param"] == "focus.stepz"
    assert (await ask(client, 400, method={"steps": 0}))["param"] == "method.steps"
    assert (await ask(client, 404, model="other"))["code"] == "model_not_found"
    error = await ask(client, 404, document=None, adaptation="adp_x", stream=True)
    assert error["code"] == "adaptation_not_found"
    assert pool.works == []
    await assert_idle(client)


async def test_an_adaptation_that_is_not_ready(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    id = (await client.post("/v1/adaptations", json={"document": "x"})).json()["id"]
    await until(lambda: id in pool.queues)
    response = await client.post(PATH, json={"adaptation": id, "questions": ["q"]})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adaptation_not_ready")
    assert 1 <= int(response.headers["retry-after"]) <= 120
    await client.post(f"/v1/adaptations/{id}/cancel")
    response = await client.post(PATH, json={"adaptation": id, "questions": ["q"]})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adaptation_cancelled")
    assert "retry-after" not in response.headers


async def test_a_failed_reading_fails_the_answer(client: httpx.AsyncClient, pool: Any) -> None:
    pool.scripts = [[]]
    asked = asyncio.create_task(ask(client, 400))
    await until(lambda: pool.adapts)
    id = pool.adapts[0].adaptation_id
    failed = messages.AdaptationFailed(adaptation_id=id, code="invalid_method", message="short")
    pool.say(id, failed)
    assert (await asked)["code"] == "invalid_method"
    await assert_idle(client)


async def hang_up(client: httpx.AsyncClient, condition: Callable[[], object], **more: Any) -> None:
    asked = asyncio.create_task(client.post(PATH, json={**ASK, **more}))
    await until(condition)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_while_reading_cancels_the_reading(
    client: Any, pool: Any, stream: bool
) -> None:
    pool.hold = True
    await hang_up(client, lambda: pool.adapts, stream=stream)
    await until(lambda: pool.cancelled)
    await until(lambda: client.app.state.services.jobs.num_active == 0)
    assert pool.cancelled == [pool.adapts[0].adaptation_id]
    await assert_idle(client)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_while_answering_cancels_the_answer(
    client: Any, pool: Any, stream: bool
) -> None:
    await ask(client)
    pool.hold = True
    await hang_up(client, lambda: len(pool.generates) == 2, stream=stream)
    await until(lambda: pool.abandoned)
    assert pool.abandoned == [pool.generates[1].request_id]
    await assert_idle(client)
    assert await metric(client, 'requests_total{kind="answer",outcome="cancelled"}') == 1


async def test_a_reading_goes_on_while_someone_wants_it(client: Any, pool: Any) -> None:
    pool.hold = True
    jobs = client.app.state.services.jobs
    other = asyncio.create_task(ask(client))
    await until(lambda: pool.adapts)
    id = pool.adapts[0].adaptation_id
    await hang_up(client, lambda: jobs.active(id).num_waiters == 2)
    await until(lambda: jobs.active(id).num_waiters == 1)
    assert pool.cancelled == []
    pool.hold = False
    pool.say(id, *pool.adaptation_script(id))
    assert (await other)["adaptation"]["id"] == id


async def test_a_reading_asked_for_by_name_goes_on(client: Any, pool: Any) -> None:
    pool.hold = True
    body = {"document": ASK["document"], "method": {"type": "read"}}
    asked = asyncio.create_task(client.post(PATH, json=ASK))
    await until(lambda: pool.adapts)
    assert (await client.post("/v1/adaptations", json=body)).status_code == 200
    asked.cancel()
    jobs = client.app.state.services.jobs
    id = pool.adapts[0].adaptation_id
    await until(lambda: jobs.active(id).num_waiters == 0)
    await client.get(f"/v1/adaptations/{id}")  # by now it would have been cancelled
    assert pool.cancelled == []


async def test_a_client_that_stops_reading_is_hung_up_on(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.answer_text = ["x" * 2**20] * 64
    async with serve(settings.model_copy(update={"write_timeout_s": 0.1}), pool) as client:
        services = client.app.state.services
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, limit=1024)
        body = json.dumps({**ASK, "stream": True}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: pool.generates)
        await until(lambda: services.intake.num_requests == 0)
        writer.close()
        await assert_idle(client)


async def test_many_hang_ups_leave_nothing_behind(client: Any, pool: Any) -> None:
    pool.hold = True
    for number in range(20):
        asked = asyncio.create_task(client.post(PATH, json={**ASK, "document": f"d{number}"}))
        await asyncio.sleep(0.002 * (number % 5))
        asked.cancel()
    services = client.app.state.services
    await until(lambda: services.intake.num_requests == 0 and services.jobs.num_active == 0)
    pool.hold = False
    assert (await ask(client))["answers"][0]["answer"] == "forty two"
    await assert_idle(client)


async def test_an_answer_is_tried_again_when_its_worker_dies(
    client: httpx.AsyncClient, pool: Any
) -> None:
    await ask(client)
    pool.hold = True
    asked = asyncio.create_task(ask(client))
    await until(lambda: len(pool.generates) == 2)
    pool.hold = False
    id = pool.generates[1].request_id
    pool.say(id, fail(id, "worker_died"))
    assert (await asked)["answers"][1]["answer"] == "forty two"
    assert len(pool.generates) == 3
    pool.script = lambda work: [fail(work.request_id, "worker_died")]
    response = await client.post(PATH, json=ASK)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_died")
    assert "retry-after" in response.headers
    await assert_idle(client)


async def test_a_stream_that_has_begun_ends_with_the_error(
    client: httpx.AsyncClient, pool: Any
) -> None:
    await ask(client)

    def script(work: messages.Generate) -> list[Any]:
        said = pool.answer_script(work)
        return [*said[:5], fail(work.request_id, "worker_died")]

    pool.script = script
    events = await ask_streaming(client)
    assert events[-1]["error"]["code"] == "worker_died"
    assert [event["object"] for event in events[:-1]][-1] == "answer.delta"
    await assert_idle(client)


async def test_a_stream_ends_well_over_a_crash(client: httpx.AsyncClient, pool: Any) -> None:
    await ask(client)
    delta = messages.TokenDelta(
        request_id="r", sequence_id="never heard of", index=0, token_id=1, text="x"
    )
    focus = messages.FocusProgress(request_id="r", step=1, steps=2)
    pool.script = lambda work: [focus, delta]
    events = await ask_streaming(client)
    assert [event.get("phase") for event in events[:-1]] == ["focus"]
    assert events[-1]["error"]["code"] == "internal_error"
    await assert_idle(client)


async def test_a_lost_adapter_is_made_again_from_the_document(
    client: httpx.AsyncClient, pool: Any
) -> None:
    first = (await ask(client))["adaptation"]["id"]
    generate = pool.script
    lost = [True]

    def script(work: Any) -> list[Any]:
        if isinstance(work, messages.Generate) and lost:
            lost.pop()
            return [fail(work.request_id, "adapter_not_found")]
        said: list[Any] = generate(work)
        return said

    pool.script = script
    second = (await ask(client))["adaptation"]["id"]
    assert first != second
    job = (await client.get(f"/v1/adaptations/{first}")).json()
    assert (job["status"], job["error"]["code"]) == ("expired", "adapter_evicted")
    lost.append(True)
    error = await ask(client, 410, adaptation=second, document=None)
    assert error["code"] == "adapter_evicted"
    error = await ask(client, 410, adaptation=second, document=None)
    assert error["code"] == "adapter_evicted"


async def test_somebody_elses_deletion_does_not_spoil_an_answer(
    client: httpx.AsyncClient, pool: Any
) -> None:
    pool.hold = True
    asked = asyncio.create_task(ask(client))
    await until(lambda: pool.adapts)
    pool.hold = False
    await client.delete(f"/v1/adaptations/{pool.adapts[0].adaptation_id}")
    reply = await asked
    assert reply["adaptation"]["id"] == pool.adapts[1].adaptation_id


async def test_requests_are_bounded(serve: Any, settings: Settings, pool: Any) -> None:
    pool.hold = True
    async with serve(settings.model_copy(update={"max_active_requests": 1}), pool) as client:
        asked = asyncio.create_task(client.post(PATH, json=ASK))
        await until(lambda: pool.adapts)
        for path, body in ((PATH, ASK), ("/v1/completions", {"model": "tiny", "prompt": "x"})):
            refused = await client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        asked.cancel()
        services = client.app.state.services
        await until(lambda: services.intake.num_requests == 0)


async def test_a_broken_answer_does_not_leak_work(client: httpx.AsyncClient, pool: Any) -> None:
    pool.script = lambda work: [fail(work.request_id, "context_length_exceeded")]
    response = await client.post(
        "/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True}
    )
    assert response.status_code == 200
    assert '"context_length_exceeded"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    await assert_idle(client)
