"""What browsers are told, and what a foreign web page may not do."""

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from imprint.server.config import Settings
from imprint.server.keys import KeyRing

pytestmark = pytest.mark.anyio
KEY = "sk-alice-0123456789"
PAGE = "https://page.example"
ADAPT = "/v1/adaptations"


async def test_every_response_is_guarded(client: httpx.AsyncClient, pool: Any) -> None:
    pool.submit = None  # a bug
    crash = {"model": "tiny", "prompt": "x"}
    for response in (
        await client.get("/version"),
        await client.get("/nope"),
        await client.get("/metrics"),
        await client.post("/v1/completions", json=crash),
        await client.put("/v1/models"),
    ):
        headers = response.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


async def ask(client: httpx.AsyncClient, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(ADAPT, json={"document": "x"}, headers=given)


@pytest.mark.parametrize("origin", [PAGE, "null", "http://127.0.0.1:1", "http://localhost"])
async def test_without_keys_a_foreign_page_may_not_post(
    client: httpx.AsyncClient, pool: Any, origin: str
) -> None:
    refused = await ask(client, Origin=origin)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert pool.works == []
    own = f"http://127.0.0.1:{client.base_url.port}"
    assert (await ask(client, Origin=own)).status_code == 202


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", ""]
)
async def test_without_keys_a_foreign_name_does_not_lead_here(
    client: httpx.AsyncClient, host: str
) -> None:
    response = await client.get("/v1/models", headers={"Host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8765", "192.0.2.7"])
async def test_without_keys_addresses_lead_here(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/v1/models", headers={"Host": host})).status_code == 200


async def test_names_are_free_where_others_keep_watch(
    serve: Any, settings: Settings, pool: Any
) -> None:
    async with serve(settings.model_copy(update={"allow_keyless": True}), pool) as client:
        response = await client.get("/metrics", headers={"Host": "imprint:8765"})
        assert response.status_code == 200


async def test_with_keys_the_key_decides(serve: Any, settings: Settings, pool: Any) -> None:
    keyed = settings.model_copy(update={"api_keys": KeyRing.parse(f"alice:{KEY}")})
    async with serve(keyed, pool) as client:
        given = {"Authorization": f"Bearer {KEY}"}
        accepted = await ask(client, Origin=PAGE, Host="imprint.example", **given)
        assert accepted.status_code == 202
        assert "access-control-allow-origin" not in accepted.headers
        assert (await ask(client, Origin=PAGE)).status_code == 401


def preflight(origin: str, headers: str = "authorization, content-type") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": headers,
    }


@pytest.mark.parametrize("keyed", [True, False])
async def test_pages_on_the_list(serve: Any, settings: Settings, pool: Any, keyed: bool) -> None:
    keys = KeyRing.parse(f"alice:{KEY}") if keyed else None
    listed = settings.model_copy(update={"cors_origins": (PAGE,), "api_keys": keys})
    async with serve(listed, pool) as client:
        allowed = await client.options(ADAPT, headers=preflight(PAGE))
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        for refused in (
            await client.options(ADAPT, headers=preflight("https://other.example")),
            await client.options(ADAPT, headers=preflight(PAGE, "x-secret")),
        ):
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "origin_not_allowed"
        made = await ask(client, Origin=PAGE, Authorization=f"Bearer {KEY}")
        assert made.status_code == 202
        assert made.headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in made.headers


@pytest.mark.parametrize("origins", ["*", "example.org", "https://example.org/path", "null"])
def test_only_origins_are_origins(origins: str) -> None:
    with pytest.raises(ValidationError):
        Settings(cors_origins=origins)  # type: ignore[arg-type]


def test_origins_are_read_from_a_list() -> None:
    text = "https://a.example, http://localhost:3000"
    origins = Settings(cors_origins=text).cors_origins  # type: ignore[arg-type]
    assert origins == ("https://a.example", "http://localhost:3000")
