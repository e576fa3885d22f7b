"""What one key made is, for every other key, as if it never was: over all routes there are.

Read from `app.routes`, so that a new route is covered, or fails here until this file knows how.
"""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import RouteContext, iter_route_contexts

from imprint.server.app import create_app
from imprint.server.auth import OPEN_FOLDERS, OPEN_PATHS
from imprint.server.config import Settings
from imprint.server.keys import KeyRing

pytestmark = pytest.mark.anyio

KEYS = {"alice": "sk-alice-0123456789", "bob": "sk-bob-0123456789ab"}
IDS = {
    "adaptation": ("/v1/adaptations", {"document": "a secret canary"}),
    "document": ("/v1/documents", {"text": "a secret canary"}),
}
"""How one of each resource is made."""
PATHS = {
    "/v1/documents/{id}": "{document}",
    "/v1/adaptations/{id}": "{adaptation}",
    "/v1/models/{name:path}": "tiny:{adaptation}",
    "/static/{name}": "{adaptation}.js",  # no file: the page's files are everybody's
}
"""What stands for a route's parameter: of the longest path here that the route's begins with."""
BODIES: dict[str, dict[str, Any]] = {"/v1/documents/{id}/append": {"text": "more"}}
"""Bodies of routes that have both an id in the path and a body."""
NAMED = {
    ("/v1/answers", "adaptation"): {"adaptation": "{adaptation}", "questions": ["what?"]},
    ("/v1/answers", "document_id"): {"document_id": "{document}", "questions": ["what?"]},
    ("/v1/adaptations", "document_id"): {"document_id": "{document}"},
    ("/v1/chat/completions", "model"): {
        "model": "tiny:{adaptation}",
        "messages": [{"role": "user", "content": "what?"}],
    },
    ("/v1/tokenize", "model"): {"model": "tiny:{adaptation}", "prompt": "x"},
    ("/v1/detokenize", "model"): {"model": "tiny:{adaptation}", "tokens": [1]},
    ("/v1/completions", "model"): {"model": "tiny:{adaptation}", "prompt": "x"},
    ("/v1/adaptations", "model"): None,  # names a base model only
    ("/v1/answers", "model"): None,
}
"""A body for each field that can name a resource."""
FIELDS = {"adaptation", "adaptation_id", "document_id", "model", "parent"}
CREATED_BY_ALL = {"/v1/models"}  # lists the base model, for everybody


def headers(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def routes(app: FastAPI) -> Iterator[tuple[str, RouteContext]]:
    for route in iter_route_contexts(app.routes):
        for method in sorted(route.methods or ()):
            yield method, route


@pytest.fixture
def keyed(settings: Settings) -> Settings:
    text = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    return settings.model_copy(update={"api_keys": KeyRing.parse(text)})


@pytest.fixture
async def client(serve: Any, keyed: Settings, pool: Any) -> Any:
    async with serve(keyed, pool) as client:
        yield client


@pytest.fixture
async def ids(client: httpx.AsyncClient) -> dict[str, str]:
    """Alice's resources, ready to be asked."""
    made = {}
    for name, (path, body) in IDS.items():
        made[name] = (await client.post(path, json=body, headers=headers("alice"))).json()["id"]
    events = f"/v1/adaptations/{made['adaptation']}/events"
    await client.get(events, headers={**headers("alice"), "Accept": "text/event-stream"})
    return made


def parameter(route: RouteContext) -> str:
    known = [path for path in PATHS if route.path.startswith(path)]
    assert known, f"say in PATHS what stands for the parameter of {route.path}"
    return PATHS[max(known, key=len)]


def fill(value: Any, ids: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: fill(item, ids) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item, ids) for item in value]
    return value.format(**ids) if isinstance(value, str) else value


def unknown(ids: dict[str, str]) -> dict[str, str]:
    """Ids of the same form that never were."""
    return {name: id[:4] + "0" * (len(id) - 4) for name, id in ids.items()}


def same_but_for_ids(first: httpx.Response, second: httpx.Response, ids: dict[str, str]) -> bool:
    left, right = first.text, second.text
    for name, id in ids.items():
        left, right = left.replace(id, name), right.replace(unknown(ids)[name], name)
    names = {"date", "x-request-id"}
    kept = [{k: v for k, v in r.headers.items() if k not in names} for r in (first, second)]
    return left == right and kept[0] == kept[1]


async def test_no_key_no_answer(client: Any) -> None:
    for method, route in routes(client.app):
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        response = await client.request(method, path)
        opened = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
        assert (response.status_code == 401) is not opened, (method, path)
    for path in ("/v1/nope", "/nope", "/v1/adaptations/", "/health/", "/health/../v1/models"):
        assert (await client.get(path)).status_code == 401, path
    assert (await client.request("OPTIONS", "/v1/models")).status_code == 401


def test_what_is_open_is_no_documents() -> None:
    assert not any(path.startswith("/v1") for path in (*OPEN_PATHS, *OPEN_FOLDERS))


async def test_another_owners_id_in_a_path(client: Any, ids: dict[str, str]) -> None:
    num_checked = 0
    for method, route in routes(client.app):
        if "{" not in route.path:
            continue
        name = route.path.partition("{")[2].partition("}")[0]
        replies = []
        for known in (ids, unknown(ids)):
            path = route.path.replace("{" + name + "}", fill(parameter(route), known))
            body = fill(BODIES.get(route.path), known)
            replies.append(await client.request(method, path, json=body, headers=headers("bob")))
        assert [reply.status_code for reply in replies] == [404, 404], (method, route.path)
        assert same_but_for_ids(*replies, ids), (method, route.path)
        num_checked += 1
    assert num_checked >= 5
    # Bob's requests changed nothing.
    for name, (path, _) in IDS.items():
        kept = await client.get(f"{path}/{ids[name]}", headers=headers("alice"))
        assert kept.status_code == 200
        assert kept.json().get("status", "succeeded") == "succeeded"


def body_fields(app: FastAPI) -> Iterator[tuple[str, str]]:
    for _, route in routes(app):
        body = getattr(route, "body_field", None)
        if body is not None:
            fields = getattr(body.field_info.annotation, "model_fields", {})
            for name in sorted(FIELDS & set(fields)):
                yield route.path, name


async def test_another_owners_id_in_a_body(client: Any, ids: dict[str, str]) -> None:
    assert set(body_fields(client.app)) == set(NAMED), "say in NAMED what names a resource"
    for (path, field), body in NAMED.items():
        if body is None:
            continue
        replies = [
            await client.post(path, json=fill(body, known), headers=headers("bob"))
            for known in (ids, unknown(ids))
        ]
        assert [reply.status_code for reply in replies] == [404, 404], (path, field)
        assert same_but_for_ids(*replies, ids), (path, field)
        mine = await client.post(path, json=fill(body, ids), headers=headers("alice"))
        assert mine.status_code == 200, (path, field, mine.text)


async def test_lists_hold_ones_own(client: Any, ids: dict[str, str]) -> None:
    for method, route in routes(client.app):
        if method == "GET" and "{" not in route.path:
            for name in ("alice", "bob"):
                text = (await client.get(route.path, headers=headers(name))).text
                found = any(id in text for id in ids.values())
                assert not (name == "bob" and found), route.path
    for path, key in (
        ("/v1/adaptations", "adaptation"),
        ("/v1/models", "adaptation"),
        ("/v1/documents", "document"),
    ):
        assert ids[key] in (await client.get(path, headers=headers("alice"))).text


async def test_a_list_has_no_foreign_cursor(client: Any, ids: dict[str, str]) -> None:
    for path, cursor in (
        ("/v1/adaptations", "{adaptation}"),
        ("/v1/documents", "{document}"),
        ("/v1/models", "tiny:{adaptation}"),
    ):
        for known in (ids, unknown(ids)):
            after = fill(cursor, known)
            page = await client.get(path, params={"after": after}, headers=headers("bob"))
            assert page.status_code == 404


async def test_the_same_document_is_each_owners_own(client: Any, ids: dict[str, str]) -> None:
    path, body = IDS["adaptation"]
    theirs = await client.post(path, json=body, headers=headers("bob"))
    assert theirs.status_code == 202
    assert theirs.json()["id"] != ids["adaptation"]
    again = await client.post(path, json=body, headers=headers("alice"))
    assert (again.status_code, again.json()["id"]) == (200, ids["adaptation"])


async def test_deleting_what_another_is_deleting(
    client: Any, ids: dict[str, str], pool: Any
) -> None:
    pool.hold_evict = asyncio.Event()
    path = f"/v1/adaptations/{ids['adaptation']}"
    deleting = asyncio.create_task(client.delete(path, headers=headers("alice")))
    while (await client.get(path, headers=headers("alice"))).status_code != 404:
        await asyncio.sleep(0.005)
    assert (await client.delete(path, headers=headers("bob"))).status_code == 404
    pool.hold_evict.set()
    assert (await deleting).status_code == 200


async def test_keys_survive_a_restart(
    serve: Any, keyed: Settings, settings: Settings, pool: Any
) -> None:
    body = {"document": "kept"}
    async with serve(keyed, pool) as client:
        made = await client.post("/v1/adaptations", json=body, headers=headers("alice"))
        path = f"/v1/adaptations/{made.json()['id']}"
    async with serve(keyed, pool) as client:
        assert (await client.get(path, headers=headers("alice"))).status_code == 200
        assert (await client.get(path, headers=headers("bob"))).status_code == 404
    async with serve(settings, pool) as client:  # without keys there is one more owner
        assert (await client.get(path)).status_code == 404
        mine = (await client.post("/v1/adaptations", json=body)).json()["id"]
    local = KeyRing.parse(f"local:{KEYS['bob']}")
    async with serve(settings.model_copy(update={"api_keys": local}), pool) as client:
        kept = await client.get(f"/v1/adaptations/{mine}", headers=headers("bob"))
        assert kept.status_code == 200


def test_the_app_refuses_a_bad_file(settings: Settings, pool: Any) -> None:
    missing = settings.model_copy(update={"api_keys_file": settings.data_dir / "missing"})
    with pytest.raises(ValueError, match="cannot be read"):
        create_app(missing, pool)
