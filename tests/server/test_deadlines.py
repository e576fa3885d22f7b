"""A deadline ends work wherever it is, and is counted once, by the place where it struck."""

import asyncio
import re
from typing import Any

import httpx
import pytest

from imprint.server import messages
from imprint.server.errors import DeadlineError
from imprint.server.generation import DEADLINE_GRACE_S, Generation
from imprint.server.metrics import Metrics

pytestmark = pytest.mark.anyio
LATE = {"code": "deadline_exceeded", "message": "it is so"}


async def counted(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    found = re.findall(r'request_deadline_exceeded_total\{phase="(\w+)"\} (\S+)', text)
    return {phase: float(value) for phase, value in found}


async def ask_late(client: Any, **changes: Any) -> dict[str, float]:
    """What is counted after an answer that came too late, when nothing runs any more."""
    body = {"document": "The code is 42.", "questions": ["What is the code?"], **changes}
    reply = await client.post("/v1/answers", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    async with asyncio.timeout(10):
        while client.app.state.services.jobs.num_active:
            await asyncio.sleep(0.005)
    return await counted(client)


async def test_it_is_counted_once_by_where_it_struck(client: Any, pool: Any) -> None:
    assert await counted(client) == {"queue": 0, "quantum": 0, "decode": 0}
    pool.hold = True  # the document waits
    assert await ask_late(client, timeout_s=0.05) == {"queue": 1, "quantum": 0, "decode": 0}
    pool.hold = False

    def begun(work: Any) -> list[Any]:
        return [messages.AdaptationStarted(adaptation_id=work.adaptation_id, attempt=1)]

    pool.script = begun  # it is being read
    assert await ask_late(client, timeout_s=0.3) == {"queue": 1, "quantum": 1, "decode": 0}
    pool.script = lambda work: (
        pool.adaptation_script(work.adaptation_id)
        if isinstance(work, messages.Adapt)
        else [messages.RequestFailed(request_id=work.request_id, phase="decode", **LATE)]
    )
    assert await ask_late(client) == {"queue": 1, "quantum": 1, "decode": 1}

    def ends_late(work: Any) -> list[Any]:
        id = work.adaptation_id
        return [
            *begun(work),
            messages.AdaptationFailed(adaptation_id=id, phase="quantum", **LATE),
        ]

    pool.script = ends_late  # the job's own deadline: the job counts it, the answer does not again
    assert await ask_late(client, document="More.") == {"queue": 1, "quantum": 2, "decode": 1}


@pytest.mark.parametrize(
    ("heard", "phase"),
    [
        (None, "queue"),
        (messages.FocusProgress(request_id="r", step=1, steps=2), "quantum"),
        (
            messages.TokenDelta(request_id="r", sequence_id="s", index=0, token_id=1, text="x"),
            "decode",
        ),
    ],
)
async def test_a_worker_that_says_nothing_more_is_not_waited_for(
    client: Any, pool: Any, heard: Any, phase: str
) -> None:
    pool.scripts = [[] if heard is None else [heard]]
    work = messages.Generate(
        request_id="r",
        prompts=[messages.Prompt(sequence_id="s", tokens=[1])],
        timeout_s=0.05 - DEADLINE_GRACE_S,
    )
    tokenizer = client.app.state.services.tokenizer
    generation = Generation(
        pool, Metrics(), work, tokenizer, lambda _: None, kind="answer", strip=True
    )
    with pytest.raises(DeadlineError) as caught:
        async for _ in generation.run():
            pass
    assert caught.value.phase == phase
    assert pool.abandoned == ["r"]
