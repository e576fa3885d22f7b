"""Hostile bytes on the socket: slow, endless, malformed, too many. Each is answered or ended."""

import asyncio
import contextlib
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
POST = b"POST /v1/adaptations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
FAST = {"head_timeout_s": 0.3, "upload_timeout_s": 0.3}


class Connection:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON body of the next response."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).decode()
        status, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, json.loads(body)

    async def check(self, status: int, code: str) -> None:
        """The next response is this error, in the one shape."""
        got, headers, body = await self.reply()
        assert (got, body["error"]["code"]) == (status, code)
        assert list(body["error"]) == ["message", "type", "param", "code"]
        assert headers["content-type"] == "application/json"
        assert headers["x-request-id"].startswith("req_")
        assert headers["x-content-type-options"] == "nosniff"

    async def ends(self, within_s: float = 10) -> bool:
        """Whether the server hangs up."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), within_s) == b""
        return True


@contextlib.asynccontextmanager
async def connect(client: Any) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_responses_do_not_wait_for_acknowledgements(client: Any) -> None:
    async with connect(client) as connection:
        await connection.send(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await connection.reply())[0] == 404
        (open_one,) = client.server.server_state.connections
        accepted = open_one.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.fixture
async def hasty(serve: Any, settings: Settings, pool: Any) -> Any:
    async with serve(settings.model_copy(update=FAST), pool) as client:
        yield client


async def drip(connection: Connection, data: bytes, every_s: float) -> None:
    """One byte at a time, until the server has had enough."""
    with contextlib.suppress(ConnectionError):
        for index in range(len(data)):
            await connection.send(data[index : index + 1])
            await asyncio.sleep(every_s)


async def test_a_slow_head(hasty: Any) -> None:
    async with connect(hasty) as slow:
        dripping = asyncio.create_task(drip(slow, b"GET /version HTTP/1.1\r\n" * 9, 0.02))
        await slow.check(408, "request_timeout")
        assert await slow.ends()
        await dripping


async def test_a_slow_second_head(hasty: Any) -> None:
    async with connect(hasty) as slow:
        await slow.send(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await slow.reply())[0] == 200
        await slow.send(b"GET /vers")
        await slow.check(408, "request_timeout")
        assert await slow.ends()


async def test_a_connection_without_a_request(hasty: Any) -> None:
    async with connect(hasty) as idle:
        assert await idle.ends(5)


async def test_a_slow_body(hasty: Any) -> None:
    async with connect(hasty) as slow:
        await slow.send(POST + b"Content-Length: 5000\r\n\r\n")
        dripping = asyncio.create_task(drip(slow, b'{"document": "' + b"x" * 900, 0.02))
        await slow.check(408, "request_timeout")
        assert await slow.ends()
        await dripping


async def test_a_long_body_may_take_longer(serve: Any, settings: Settings, pool: Any) -> None:
    body = json.dumps({"document": "x" * 40_000}).encode()
    async with serve(settings.model_copy(update=FAST), pool) as client, connect(client) as steady:
        await steady.send(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 10_000):
            await steady.send(body[start : start + 10_000])
            await asyncio.sleep(0.15)
        assert (await steady.reply())[0] == 202


async def test_an_answer_may_take_longer_than_its_request(
    serve: Any, settings: Settings, pool: Any
) -> None:
    pool.hold = True
    async with serve(settings.model_copy(update=FAST), pool) as client:
        asked = asyncio.create_task(
            client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        )
        await asyncio.sleep(0.6)
        work = pool.generates[0]
        pool.say(work.request_id, *pool.answer_script(work))
        assert (await asked).status_code == 200


async def test_the_rest_of_a_refused_body_is_not_read_for_ever(client: Any) -> None:
    async with connect(client) as endless:
        await endless.send(POST + b"Content-Length: 99999999999\r\n\r\n")
        assert (await endless.reply())[0] == 413
        began = time.monotonic()
        dripping = asyncio.create_task(drip(endless, b"x" * 10_000, 0.05))
        assert await endless.ends(15)
        assert time.monotonic() - began < 10
        dripping.cancel()


@pytest.mark.parametrize("in_one_piece", [True, False])
async def test_a_flood_of_headers(client: Any, in_one_piece: bool) -> None:
    flood = b"".join(b"X-%d: %s\r\n" % (index, b"x" * 100) for index in range(200))
    async with connect(client) as connection:
        head = b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + flood
        if in_one_piece:
            await connection.send(head + b"\r\n")
        else:
            for start in range(0, len(head), 2000):
                await connection.send(head[start : start + 2000])
        await connection.check(431, "headers_too_large")


async def test_a_long_target(client: Any) -> None:
    async with connect(client) as connection:
        await connection.send(
            b"GET /v1/models?" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        await connection.check(431, "headers_too_large")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\0c\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    ],
)
async def test_what_is_no_request(client: Any, sent: bytes) -> None:
    async with connect(client) as connection:
        await connection.send(sent)
        await connection.check(400, "invalid_http")
        assert await connection.ends()


async def test_a_transfer_encoding_that_nobody_knows(client: Any) -> None:
    async with connect(client) as connection:
        await connection.send(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n")
        await connection.check(400, "invalid_http")


async def test_a_body_that_breaks_off(client: Any, pool: Any) -> None:
    async with connect(client) as connection:
        await connection.send(POST + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"doc\r\nnope\r\n')
        await connection.check(400, "invalid_http")
        assert await connection.ends()
    assert pool.works == []


async def test_one_connection_too_many(serve: Any, settings: Settings, pool: Any) -> None:
    few = settings.model_copy(update={"max_connections": 2, "head_timeout_s": 30})
    async with serve(few, pool) as client:
        async with connect(client) as first, connect(client):
            await first.send(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await first.reply())[0] == 200
            async with connect(client) as third:
                await third.check(503, "queue_full")
                assert await third.ends()
        assert (await client.get("/version")).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
async def test_a_compressed_body_is_not_opened(client: Any, encoding: str) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = await client.post("/v1/adaptations", content=bomb, headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"
