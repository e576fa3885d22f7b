"""`Idempotency-Key`: what is sent again is done once, and answered alike."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from imprint.server import replay_journal
from imprint.server.config import Settings
from imprint.server.journal import Journal
from imprint.server.keys import KeyRing
from imprint.server.replay_journal import KeptReply, forget_replies, get_reply, keep_reply

pytestmark = pytest.mark.anyio
KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789ab"}
ANSWER = {"document": "text", "questions": ["q"]}
DOCUMENT = {"text": "a text", "title": "T"}


async def post(
    client: httpx.AsyncClient, path: str, body: Any, key: str = "k", **headers: str
) -> httpx.Response:
    return await client.post(path, json=body, headers={"Idempotency-Key": key, **headers})


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def check_replayed(first: httpx.Response, second: httpx.Response) -> None:
    assert first.is_success
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert (second.status_code, second.content) == (first.status_code, first.content)
    for name in ("location", "content-type"):
        assert second.headers.get(name) == first.headers.get(name)


async def test_what_is_made_is_made_once(client: httpx.AsyncClient, pool: Any) -> None:
    made = await post(client, "/v1/documents", DOCUMENT, "document")
    append = f"/v1/documents/{made.json()['id']}/append"
    for number, (path, body) in enumerate(
        [
            ("/v1/documents", DOCUMENT),
            (append, {"text": "more"}),
            ("/v1/adaptations", {"document": "another"}),
            ("/v1/answers", ANSWER),
        ]
    ):
        first = await post(client, path, body, str(number))
        num_works = len(pool.works)
        check_replayed(first, await post(client, path, body, str(number)))
        assert len(pool.works) == num_works
    listed = (await client.get("/v1/documents")).json()["data"]
    assert [row["version"] for row in listed] == [1, 2]


async def test_a_file_has_another_boundary_each_time(client: httpx.AsyncClient) -> None:
    replies = [
        await client.post(
            "/v1/documents",
            files={"file": ("a.txt", text, "text/plain")},
            headers={"Idempotency-Key": "k"},
        )
        for text in (b"a file", b"a file", b"another")
    ]
    check_replayed(*replies[:2])
    assert code(replies[2]) == (409, "idempotency_key_reused")


async def test_a_key_belongs_to_one_request(client: httpx.AsyncClient) -> None:
    assert (await post(client, "/v1/documents", DOCUMENT)).status_code == 201
    for path, body in (("/v1/documents", {"text": "b"}), ("/v1/adaptations", DOCUMENT)):
        assert code(await post(client, path, body)) == (409, "idempotency_key_reused")


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", b"\xc3\xa9"])
async def test_keys_that_cannot_be_used(client: httpx.AsyncClient, key: Any) -> None:
    assert code(await post(client, "/v1/documents", DOCUMENT, key)) == (
        400,
        "invalid_idempotency_key",
    )
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    response = await client.post("/v1/documents", json=DOCUMENT, headers=twice)
    assert code(response) == (400, "invalid_idempotency_key")
    assert (await client.get("/v1/documents")).json()["data"] == []


async def test_two_at_once(client: httpx.AsyncClient, pool: Any) -> None:
    pool.hold = True
    first = asyncio.create_task(post(client, "/v1/answers", ANSWER))
    while not pool.works:
        await asyncio.sleep(0.005)
    second = await post(client, "/v1/answers", ANSWER)
    assert code(second) == (409, "idempotency_key_in_use")
    assert second.headers["retry-after"] == "1"
    other = await post(client, "/v1/answers", {**ANSWER, "questions": ["r"]})
    assert code(other) == (409, "idempotency_key_reused")
    pool.hold = False
    (work,) = pool.works
    pool.say(work.adaptation_id, *pool.script(work))
    check_replayed(await first, await post(client, "/v1/answers", ANSWER))


async def test_refusals_and_streams_are_not_kept(client: httpx.AsyncClient, pool: Any) -> None:
    for _ in range(2):
        response = await post(client, "/v1/answers", {**ANSWER, "max_tokens": 0})
        assert code(response) == (400, "invalid_request")
    stream = {**ANSWER, "stream": True}
    for number in (1, 2):
        assert (await post(client, "/v1/answers", stream, "s")).text.endswith("data: [DONE]\n\n")
        assert len(pool.generates) == number
    assert (await post(client, "/v1/answers", ANSWER)).status_code == 200


async def test_what_is_deleted_is_not_replayed(client: httpx.AsyncClient) -> None:
    stored = await post(client, "/v1/documents", DOCUMENT)
    body = {"document_id": stored.json()["id"], "questions": ["q"]}
    answers = await post(client, "/v1/answers", body, "answers")
    await client.delete(f"/v1/adaptations/{answers.json()['adaptation']['id']}")
    again = await post(client, "/v1/answers", body, "answers")
    assert "idempotent-replayed" not in again.headers
    await client.delete(f"/v1/documents/{stored.json()['id']}")
    assert code(await post(client, "/v1/answers", body, "answers")) == (404, "document_not_found")
    assert (await post(client, "/v1/documents", DOCUMENT)).json()["id"] != stored.json()["id"]


async def test_keys_are_each_owners_own_and_survive_a_restart(
    serve: Any, settings: Settings, pool: Any
) -> None:
    text = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    keyed = settings.model_copy(update={"api_keys": KeyRing.parse(text)})
    replies = {}
    for again in (False, True):
        async with serve(keyed, pool) as client:
            for name, key in KEYS.items():
                bearer = {"Authorization": f"Bearer {key}"}
                reply = await post(client, "/v1/documents", DOCUMENT, **bearer)
                if again:
                    check_replayed(replies[name], reply)
                replies[name] = reply
    assert replies["alice"].json()["id"] != replies["bob"].json()["id"]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite3")
    yield journal
    journal.close()


REPLY = KeptReply(request_sha256="a", status=201, location=None, body=b"{}")


def test_old_replies_are_forgotten(journal: Journal) -> None:
    keep_reply(journal, "o", "k", REPLY)
    forget_replies(journal, time.time() + replay_journal.KEEP_S - 60)
    assert get_reply(journal, "o", "k") == REPLY
    with journal.transaction() as db:
        db.execute("UPDATE replies SET created_at=created_at-?", (replay_journal.KEEP_S + 1,))
    assert get_reply(journal, "o", "k") is None
    keep_reply(journal, "o", "k", REPLY)  # takes the old one's place
    assert get_reply(journal, "o", "k") == REPLY
    forget_replies(journal, time.time() + replay_journal.KEEP_S + 1)
    assert journal.db.execute("SELECT count(*) FROM replies").fetchone()[0] == 0


def test_an_owners_oldest_replies_make_room(journal: Journal) -> None:
    large = replace(REPLY, body=b"x" * (replay_journal.MAX_BYTES // 2))
    keep_reply(journal, "other", "k", large)
    for key in ("1", "2", "3"):
        keep_reply(journal, "o", key, large)
    kept = [get_reply(journal, "o", key) is not None for key in ("1", "2", "3")]
    assert kept == [False, True, True]
    assert get_reply(journal, "other", "k") == large
    with journal.transaction() as db:
        db.executemany(
            "INSERT INTO replies VALUES (NULL, 'o', ?, '', 200, NULL, x'', 0)",
            [(f"many{number}",) for number in range(replay_journal.MAX_REPLIES)],
        )
    keep_reply(journal, "o", "last", REPLY)
    num = journal.db.execute("SELECT count(*) FROM replies WHERE owner='o'").fetchone()[0]
    assert num == replay_journal.MAX_REPLIES
