"""`/v1/adaptations/{id}/study`: the text in tokens, what was tried, and nothing of it elsewhere."""

import logging
import struct
from typing import Any

import httpx
import pytest

from imprint.server import messages

pytestmark = pytest.mark.anyio
PATH = "/v1/adaptations"
TEXT = "Ünder the <b>bell</b> & 漢字 \u202eevil\u202c\r\nthe end"
METHOD = {"type": "refine", "cue_tokens": 4, "rollout_length": 3, "steps": 3}


def branches(id: str, *steps: messages.StepBranches) -> messages.AdaptationBranches:
    return messages.AdaptationBranches(adaptation_id=id, steps=list(steps))


def tried(step: int, position: int, *rollouts: list[int]) -> messages.StepBranches:
    return messages.StepBranches(
        step=step,
        num_positions=7,
        positions=[position],
        rollouts=[list(rollouts)],
        rewards=[[float(len(rollout)) for rollout in rollouts]],
    )


async def create(client: httpx.AsyncClient, text: str = TEXT) -> tuple[str, int]:
    response = await client.post(PATH, json={"document": text, "method": METHOD})
    return response.json()["id"], response.json()["num_tokens"]


def read(id: str, num_tokens: int) -> messages.AdaptationRead:
    values = [i / 8 for i in range(num_tokens)]
    return messages.AdaptationRead(
        adaptation_id=id, entropies=struct.pack(f"<{num_tokens}e", *values)
    )


async def study(client: httpx.AsyncClient, pool: Any, *steps: messages.StepBranches) -> str:
    """An adaptation that has been read, has tried these steps and goes on."""
    pool.hold = True
    id, num_tokens = await create(client)
    while id not in pool.queues:
        await client.get("/health/live")
    pool.say(id, messages.AdaptationStarted(adaptation_id=id, attempt=1), read(id, num_tokens))
    for step in steps:
        pool.say(
            id,
            branches(id, step),
            messages.AdaptationEvent(adaptation_id=id, kind="step", data={"step": step.step}),
        )
    events: list[Any] = []
    while len(events) < 3 + len(steps):
        events = (await client.get(f"{PATH}/{id}/events")).json()["data"]
    assert [event["kind"] for event in events] == [
        "queued",
        "running",
        "read",
        *["step"] * len(steps),
    ]
    return id


async def test_the_pieces_of_all_pages_are_the_document(client: Any, pool: Any) -> None:
    id = await study(client, pool)
    texts: list[str] = []
    entropies: list[float | None] = []
    more = True
    while more:
        reply = await client.get(f"{PATH}/{id}/study/tokens?limit=7&after={len(texts)}")
        page = reply.json()
        assert (reply.status_code, page["first"]) == (200, len(texts))
        texts += page["texts"]
        entropies += page["entropies"]
        more = page["has_more"]
    assert "".join(texts) == TEXT
    assert len(texts) == page["num_tokens"] == len(entropies)
    assert entropies[:3] == [None, 0.0, 0.125]  # an entropy is that of the token it was about
    beyond = (await client.get(f"{PATH}/{id}/study/tokens?after=99999")).json()
    assert (beyond["texts"], beyond["has_more"]) == ([], False)


async def test_what_was_tried_is_told_step_by_step(client: Any, pool: Any) -> None:
    encode = pool_tokenizer(client).encode
    id = await study(client, pool, tried(1, 9, encode("abc"), encode("<i>")), tried(2, 2, []))
    first = (await client.get(f"{PATH}/{id}/study?limit=1")).json()
    assert (first["object"], first["adaptation"], first["has_more"]) == ("list", id, True)
    tokens = (await client.get(f"{PATH}/{id}/study/tokens")).json()["texts"]
    assert first["data"] == [
        {
            "step": 1,
            "num_positions": 7,
            "positions": [
                {
                    "position": 9,
                    "cue": "".join(tokens[5:9]),
                    "truth": "".join(tokens[9:12]),
                    "rollouts": [{"text": "abc", "reward": 3.0}, {"text": "<i>", "reward": 3.0}],
                }
            ],
        }
    ]
    rest = (await client.get(f"{PATH}/{id}/study?after={first['last_id']}")).json()
    assert [step["step"] for step in rest["data"]] == [2]
    assert rest["data"][0]["positions"][0]["cue"] == "".join(tokens[:2])
    assert not rest["has_more"]


def pool_tokenizer(client: Any) -> Any:
    return client.app.state.services.studies._tokenizer


async def test_an_appended_document_keeps_the_tokens_of_its_parts(client: Any) -> None:
    services = client.app.state.services
    ends = services.studies._ends(["one two", "three"])
    whole = struct.unpack(f"<{len(ends) // 4}I", ends)
    assert whole == tuple(range(1, 13))  # bytes, in this tokenizer


async def test_before_the_reading_it_is_not_ready(client: Any, pool: Any) -> None:
    pool.hold = True
    id, _ = await create(client)
    for path in ("study", "study/tokens"):
        response = await client.get(f"{PATH}/{id}/{path}")
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "study_not_ready"
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get(f"{PATH}/adp_x/study")).status_code == 404
    assert (await client.get(f"{PATH}/{id}/study?after=-1")).status_code == 400
    assert (await client.get(f"{PATH}/{id}/study/tokens?limit=10001")).status_code == 400


@pytest.mark.parametrize("outcome", ["cancelled", "expired"])
async def test_it_goes_with_the_text(client: Any, pool: Any, outcome: str) -> None:
    id = await study(client, pool, tried(1, 9, [5]))
    if outcome == "cancelled":
        await client.post(f"{PATH}/{id}/cancel")
    else:
        pool.say(id, messages.AdaptationDone(adaptation_id=id, status="succeeded"))
        while (await client.get(f"{PATH}/{id}")).json()["status"] != "succeeded":
            pass
        await client.app.state.services.retention.expire(id, "adaptation_expired")
    response = await client.get(f"{PATH}/{id}/study")
    assert (response.status_code, response.json()["error"]["code"]) == (410, "study_gone")
    assert await num_rows(client) == (0, 0)


async def test_a_ready_one_whose_study_nobody_kept_is_said_to_be_one(client: Any) -> None:
    id, _ = await create(client)  # the pool's script tells of no reading
    while (await client.get(f"{PATH}/{id}")).json()["status"] != "succeeded":
        pass
    for path in ("study", "study/profile", "study/tokens"):
        response = await client.get(f"{PATH}/{id}/{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (410, "study_gone")


async def test_the_profile_is_the_document_in_few_numbers(client: Any, pool: Any) -> None:
    id = await study(client, pool)
    profile = (await client.get(f"{PATH}/{id}/study/profile")).json()
    num = profile["num_tokens"]
    expected = [i / 8 for i in range(num - 1)]  # the last token's is about nothing that is there
    assert profile["entropies"] == [pytest.approx(value, abs=1e-3) for value in expected]
    assert profile["entropy_mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert expected[0] <= profile["low"] < profile["high"] <= expected[-1]


async def test_deleting_leaves_nothing(client: Any, pool: Any) -> None:
    id = await study(client, pool, tried(1, 9, [5]))
    assert await num_rows(client) == (1, 1)
    await client.delete(f"{PATH}/{id}")
    assert (await client.get(f"{PATH}/{id}/study")).status_code == 404
    assert await num_rows(client) == (0, 0)


async def num_rows(client: Any) -> tuple[int, int]:
    def count(journal: Any) -> tuple[int, int]:
        tables = ("studies", "study_steps")
        counts = [journal.db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables]
        return counts[0], counts[1]

    found: tuple[int, int] = await client.app.state.services.journal(count)
    return found


async def test_a_resumed_study_tells_the_same_again_and_it_is_kept_once(
    client: Any, pool: Any
) -> None:
    one, two = tried(1, 9, [5]), tried(2, 9, [6])
    id = await study(client, pool, one)
    (num_tokens,) = {(await client.get(f"{PATH}/{id}")).json()["num_tokens"]}
    pool.say(
        id,
        messages.AdaptationRequeued(adaptation_id=id, attempt=2, reason="killed"),
        messages.AdaptationStarted(adaptation_id=id, attempt=2),
        read(id, num_tokens),
        branches(id, one, two),
        messages.AdaptationDone(adaptation_id=id, status="succeeded"),
    )
    while (await client.get(f"{PATH}/{id}")).json()["status"] != "succeeded":
        pass
    data = (await client.get(f"{PATH}/{id}/study")).json()["data"]
    assert [step["step"] for step in data] == [1, 2]
    kinds = [e["kind"] for e in (await client.get(f"{PATH}/{id}/events")).json()["data"]]
    assert kinds.count("read") == 1


async def test_neither_events_nor_logs_nor_metrics_hold_any_of_it(
    client: Any, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ids = pool_tokenizer(client).encode("canary rollout")
    id = await study(client, pool, tried(1, 9, ids))
    await client.get(f"{PATH}/{id}/study")
    await client.get(f"{PATH}/{id}/study/tokens")
    events = (await client.get(f"{PATH}/{id}/events")).text
    metrics = (await client.get("/metrics")).text
    for said in (events, metrics, caplog.text):
        assert "canary" not in said
        assert "bell" not in said
        assert str(ids) not in said
