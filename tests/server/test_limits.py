"""Rate limits: of each name for itself, with a wait that is enough."""

from typing import Any

import httpx
import pytest

from imprint.server.config import Settings
from imprint.server.errors import RateLimitedError
from imprint.server.keys import KeyRing
from imprint.server.limits import Bucket, Limits
from imprint.server.metrics import Metrics
from imprint.server.places import Share

KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789ab"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, *, requests: int = 0, tokens: int = 0) -> Limits:
    return Limits(
        Metrics(),
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        share=Share(1.0),
        clock=clock,
    )


def test_a_bucket_fills_up_and_no_further() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.wait_s(60) == 0
    bucket.take(70)
    assert bucket.wait_s(1) == pytest.approx(11)
    clock.now += 11
    assert bucket.wait_s(1) == pytest.approx(0)
    clock.now += 1e6
    assert bucket.wait_s(61) == pytest.approx(1)


def test_requests_are_counted_for_each_owner() -> None:
    clock = Clock()
    of_two = limits(clock, requests=2)
    of_two.admit_request("alice")
    of_two.admit_request("alice")
    with pytest.raises(RateLimitedError, match="2 requests per minute") as caught:
        of_two.admit_request("alice")
    of_two.admit_request("bob")
    wait_s = int(caught.value.headers()["Retry-After"])
    assert wait_s == 30
    clock.now += wait_s
    of_two.admit_request("alice")


def test_tokens_made_are_paid_for_afterwards() -> None:
    clock = Clock()
    of_100 = limits(clock, tokens=100)
    of_100.admit_tokens("alice", 90)
    of_100.spend_tokens("alice", 30)
    with pytest.raises(RateLimitedError, match="100 tokens per minute") as caught:
        of_100.admit_tokens("alice", 1)
    clock.now += float(caught.value.headers()["Retry-After"])
    of_100.admit_tokens("alice", 1_000_000)  # one large document may be sent, and is waited for
    with pytest.raises(RateLimitedError) as caught:
        of_100.admit_tokens("alice", 1)
    assert caught.value.headers()["Retry-After"] == "120"


def test_without_limits_nothing_is_refused() -> None:
    free = limits(Clock())
    for _ in range(1000):
        free.admit_request("alice")
        free.admit_tokens("alice", 10**9)
        free.spend_tokens("alice", 10**9)


def headers(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def limited(settings: Settings, **changes: int) -> Settings:
    keys = KeyRing.parse(",".join(f"{name}:{key}" for name, key in KEYS.items()))
    return settings.model_copy(update={"api_keys": keys, **changes})


def check_refused(response: httpx.Response) -> None:
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 120


@pytest.mark.anyio
async def test_a_name_over_its_requests(serve: Any, settings: Settings, pool: Any) -> None:
    async with serve(limited(settings, requests_per_minute=3), pool) as client:
        replies = [await client.get("/v1/models", headers=headers("alice")) for _ in range(4)]
        assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
        check_refused(replies[-1])
        assert (await client.get("/v1/models", headers=headers("bob"))).status_code == 200
        assert (await client.get("/health/live", headers=headers("alice"))).status_code == 200
        text = (await client.get("/metrics")).text
        assert 'admission_rejections_total{reason="requests_per_minute"} 1.0' in text
        assert "alice" not in text


@pytest.mark.anyio
async def test_a_name_over_its_tokens(serve: Any, settings: Settings, pool: Any) -> None:
    async with serve(limited(settings, tokens_per_minute=50), pool) as client:
        body = {"document": "x" * 60}  # a token a byte
        made = await client.post("/v1/adaptations", json=body, headers=headers("alice"))
        assert made.status_code == 202
        refused = await client.post("/v1/adaptations", json=body, headers=headers("alice"))
        check_refused(refused)
        path = f"/v1/adaptations/{made.json()['id']}"
        assert (await client.get(path, headers=headers("alice"))).status_code == 200
        assert (await client.post(f"{path}/cancel", headers=headers("alice"))).status_code == 200
        mine = await client.post("/v1/adaptations", json=body, headers=headers("bob"))
        assert mine.status_code == 202


@pytest.mark.anyio
async def test_completions_are_paid_for(serve: Any, settings: Settings, pool: Any) -> None:
    pool.answer_text = ["word "] * 40
    async with serve(limited(settings, tokens_per_minute=20), pool) as client:
        body = {"model": "tiny", "prompt": "x"}
        first = await client.post("/v1/completions", json=body, headers=headers("alice"))
        assert first.status_code == 200
        check_refused(await client.post("/v1/completions", json=body, headers=headers("alice")))


@pytest.mark.anyio
async def test_without_keys_all_share(serve: Any, settings: Settings, pool: Any) -> None:
    shared = settings.model_copy(update={"requests_per_minute": 1})
    async with serve(shared, pool) as client:
        assert (await client.get("/v1/models")).status_code == 200
        check_refused(await client.get("/v1/models"))
