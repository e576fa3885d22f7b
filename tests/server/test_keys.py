"""Keys: how they are written, that they are not kept, and when none may be missing."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from imprint.server.commands.common import UsageError, load_settings
from imprint.server.config import Settings
from imprint.server.keys import KeyRing, KeysError
from imprint.server.launching import worker_environment
from imprint.server.serve import refuse_strangers
from imprint.server.serve import serve as run_server

ALICE = "sk-alice-0123456789"
BOB = "sk-bob-0123456789ab"
DIGEST = hashlib.sha256(BOB.encode()).hexdigest()


def test_names_own_keys() -> None:
    ring = KeyRing.parse(
        f"# ours\nalice:{ALICE}, bob:sha256:{DIGEST}\n\n  alice:another-of-alice\n"
    )
    assert ring.names == ["alice", "bob"]
    assert ring.owner_of(ALICE) == ring.owner_of("another-of-alice") == "alice"
    assert ring.owner_of(BOB) == "bob"
    for unknown in ("", "alice", ALICE + "x", f"alice:{ALICE}", DIGEST, "\udcff", "ü"):
        assert ring.owner_of(unknown) is None
    assert not KeyRing.parse("\n# none\n ,, \n")


def test_keys_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"bob:{BOB}\n")
    settings = Settings(api_keys=f"alice:{ALICE}", api_keys_file=path)
    ring = settings.key_ring()
    assert ring.names == ["alice", "bob"]
    shown = repr(settings) + str(settings.model_dump()) + repr(ring) + str(vars(ring))
    assert ALICE not in shown
    assert BOB not in shown


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ALICE, "key 1 has no name"),
        (f"alice:{ALICE},b d:{BOB}", "the name of key 2"),
        (f"../x:{ALICE}", "the name of key 1"),
        ("alice:short", "16 to 256"),
        ("alice:with a space in it", "16 to 256"),
        ("alice:sha256:abc", "64 small hexadecimal digits"),
        (f"alice:{ALICE},bob:{ALICE}", "one key has two names, of alice, bob"),
    ],
)
def test_what_is_no_key_is_named_and_not_shown(text: str, reason: str) -> None:
    with pytest.raises(KeysError, match=reason) as caught:
        KeyRing.parse(text)
    secret = text.rpartition(":")[2]
    assert secret not in str(caught.value)
    with pytest.raises(ValidationError) as refused:
        Settings(api_keys=text)
    assert secret not in str(refused.value)


def test_a_flag_with_a_bad_key_is_not_shown() -> None:
    arguments: Any = type("Arguments", (), {})()
    arguments.api_keys = "alice:too-short"
    with pytest.raises(UsageError, match="--api-keys") as caught:
        load_settings(arguments)
    assert "too-short" not in str(caught.value)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    missing, empty, binary = tmp_path / "missing", tmp_path / "empty", tmp_path / "binary"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe")
    for path in (missing, empty, binary):
        with pytest.raises(KeysError, match=path.name):
            Settings(api_keys_file=path).key_ring()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_the_loopback_needs_no_key(host: str) -> None:
    refuse_strangers(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "imprint.example"])
def test_strangers_need_a_key(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeysError, match="no key is asked for"):
        refuse_strangers(Settings(host=host))
    refuse_strangers(Settings(host=host, api_keys=f"alice:{ALICE}"))
    assert caplog.text == ""
    refuse_strangers(Settings(host=host, allow_keyless=True))
    assert "can be reached by others" in caplog.text


def test_the_server_does_not_start_open_to_all(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    settings = Settings(model=tiny_checkpoint, data_dir=tmp_path / "data", host="0.0.0.0", port=0)
    assert run_server(settings) == 1
    root.handlers[:] = before
    assert "--api-keys-file" in caplog.text
    assert not (tmp_path / "data").exists()


def test_workers_get_no_keys() -> None:
    environ = {"IMPRINT_API_KEYS": f"alice:{ALICE}", "PATH": "/bin"}
    assert worker_environment(environ) == {"PATH": "/bin"}


@pytest.mark.anyio
async def test_metrics_can_need_a_key(serve: Any, settings: Settings, pool: Any) -> None:
    keyed = settings.model_copy(update={"api_keys": KeyRing.parse(f"alice:{ALICE}")})
    async with serve(keyed, pool) as client:
        assert (await client.get("/metrics")).status_code == 200
    closed = keyed.model_copy(update={"metrics_need_key": True})
    async with serve(closed, pool) as client:
        assert (await client.get("/metrics")).status_code == 401
        headers = {"Authorization": f"Bearer {ALICE}"}
        assert (await client.get("/metrics", headers=headers)).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Basic {ALICE}", ALICE, f"Bearer {BOB}", f"Bearer {ALICE} x"],
)
async def test_a_request_without_a_key_is_refused(
    serve: Any, settings: Settings, pool: Any, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    keyed = settings.model_copy(update={"api_keys": KeyRing.parse(f"alice:{ALICE}")})
    async with serve(keyed, pool) as client:
        headers = {"Authorization": header} if header else {}
        refused = await client.get("/v1/models", headers=headers)
        assert_unauthorized(refused)
        for scheme in ("Bearer", "bearer", "BEARER "):
            right = {"Authorization": f"{scheme} {ALICE}"}
            assert (await client.get("/v1/models", headers=right)).status_code == 200
    assert ALICE not in caplog.text


def assert_unauthorized(response: httpx.Response) -> None:
    """The shape of OpenAI's refusal."""
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
