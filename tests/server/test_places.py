"""One owner never fills a queue where there are several: its share, with a code of its own."""

from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from imprint.server.config import Settings
from imprint.server.errors import OverloadedError
from imprint.server.keys import KeyRing
from imprint.server.metrics import Metrics
from imprint.server.places import Places, Share, ShareError

KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789ab"}
SSE = {"Accept": "text/event-stream"}


@pytest.mark.parametrize(
    ("part", "whole", "most"), [(0.75, 256, 192), (0.5, 5, 2), (0.1, 4, 1), (0.01, 2, 1)]
)
def test_a_share_is_at_least_one_place_and_never_all(part: float, whole: int, most: int) -> None:
    assert Share(part).of(whole) == most


@pytest.mark.parametrize(("part", "whole"), [(1.0, 256), (0.75, 1)])
def test_where_a_share_is_all_the_queue_is_the_bound(part: float, whole: int) -> None:
    assert Share(part).of(whole) > 2**40


def test_places_are_counted_by_owner_and_given_back() -> None:
    places = Places("requests", 3, Share(0.75), Metrics())
    with places.take("alice"), places.take("alice"):
        with pytest.raises(ShareError, match="of yours, 2 requests"), places.take("alice"):
            pass
        with places.take("bob"):
            assert places.num_taken == 3
            with pytest.raises(OverloadedError, match="3 requests"), places.take("bob"):
                pass
        with pytest.raises(ZeroDivisionError), places.take("bob"):
            raise ZeroDivisionError
        assert places.num_taken == 2
    assert places.num_taken == 0
    with places.take("alice"):
        assert places.num_taken == 1


def keyed(settings: Settings, *names: str, **changes: Any) -> Settings:
    keys = KeyRing.parse(",".join(f"{name}:{KEYS[name]}" for name in names))
    return settings.model_copy(update={"api_keys": keys, **changes})


async def adapt(client: httpx.AsyncClient, name: str, text: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS[name]}"}
    return await client.post("/v1/adaptations", json={"document": text}, headers=headers)


def check_refused(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert 1 <= int(response.headers["retry-after"]) <= 120


@pytest.mark.anyio
async def test_adaptations_of_one_name(serve: Any, settings: Settings, pool: Any) -> None:
    pool.hold = True
    settings = keyed(settings, "alice", "bob", max_active_adaptations=4)
    async with serve(settings, pool) as client:
        made = [await adapt(client, "alice", f"{i}") for i in range(4)]
        assert [reply.status_code for reply in made] == [202, 202, 202, 429]
        check_refused(made[-1], 429, "share_exceeded")
        again = await adapt(client, "alice", "0")  # what is there already is no more work
        assert (again.status_code, again.json()["id"]) == (200, made[0].json()["id"])
        assert (await adapt(client, "bob", "0")).status_code == 202
        check_refused(await adapt(client, "bob", "1"), 503, "queue_full")
        check_refused(await adapt(client, "alice", "5"), 429, "share_exceeded")
        text = (await client.get("/metrics")).text
        assert 'admission_rejections_total{reason="key_share"} 2.0' in text
        assert 'admission_rejections_total{reason="queue_full"} 1.0' in text


@pytest.mark.anyio
async def test_bytes_of_one_name(serve: Any, settings: Settings, pool: Any) -> None:
    pool.hold = True
    async with serve(keyed(settings, "alice", "bob", max_active_bytes=1000), pool) as client:
        assert (await adapt(client, "alice", "x" * 700)).status_code == 202
        refused = await adapt(client, "alice", "y" * 60)
        check_refused(refused, 429, "share_exceeded")
        assert "at most 750 may be" in refused.json()["error"]["message"]
        assert (await adapt(client, "bob", "y" * 60)).status_code == 202


@pytest.mark.anyio
@pytest.mark.parametrize("names", [("alice",), ("alice", "bob")])
async def test_streams_and_requests_of_one_name(
    serve: Any, settings: Settings, pool: Any, names: tuple[str, ...]
) -> None:
    """With one name alone its share is all there is, and the queue's own bound is told."""
    refusal = (429, "share_exceeded") if len(names) > 1 else (503, "queue_full")
    most = {"max_key_share": 0.5, "max_event_streams": 2, "max_active_requests": 2}
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    pool.hold = True
    async with serve(keyed(settings, *names, **most), pool) as client, AsyncExitStack() as open_now:
        url = f"/v1/adaptations/{(await adapt(client, 'alice', 'x')).json()['id']}/events"
        reading = []
        for _ in range(1 if len(names) > 1 else 2):
            open_now.enter_context(client.app.state.services.intake.request("answer", "alice"))
            stream = client.stream("GET", url, headers=headers | SSE)
            reading.append((await open_now.enter_async_context(stream)).aiter_lines())
            await anext(reading[-1])
        check_refused(await client.get(url, headers=headers | SSE), *refusal)
        body = {"model": "tiny", "prompt": "x"}
        check_refused(await client.post("/v1/completions", json=body, headers=headers), *refusal)
