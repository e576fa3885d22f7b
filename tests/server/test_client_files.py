"""Adapters as files on the client's disk: in pieces, whole or not at all."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from imprint.server.client import (
    ApiError,
    AsyncImprintClient,
    ImprintClient,
    ServerUnreachableError,
)
from imprint.server.client_calls import FIRST_RESEND_S, MAX_RESENDS

MIB = 2**20
JOB = {"id": "adp_1", "object": "adaptation", "status": "queued"}


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Pieces of a reply; after them the connection breaks, if it is to."""

    def __init__(self, *pieces: bytes, breaks: bool = False) -> None:
        self.pieces, self.breaks = pieces, breaks

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.breaks:
            raise httpx.ReadError("reset")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


class Wire(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Replies in order; remembers what was sent, by its length, and its heads."""

    def __init__(self, *replies: httpx.Response) -> None:
        self.replies = list(replies)
        self.heads: list[httpx.Headers] = []
        self.sent: list[int] = []
        self.slept_s: list[float] = []

    def _reply(self, request: httpx.Request, num_bytes: int) -> httpx.Response:
        self.heads.append(request.headers)
        self.sent.append(num_bytes)
        return self.replies.pop(0)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        return self._reply(request, sum(map(len, request.stream)))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        return self._reply(request, sum([len(piece) async for piece in request.stream]))

    def client(self) -> ImprintClient:
        return ImprintClient("http://a", transport=self, sleep=self.slept_s.append)

    def async_client(self) -> AsyncImprintClient:
        async def sleep(seconds: float) -> None:
            self.slept_s.append(seconds)

        return AsyncImprintClient("http://a", transport=self, sleep=sleep)


def whole(*pieces: bytes, breaks: bool = False) -> httpx.Response:
    return httpx.Response(200, stream=Body(*pieces, breaks=breaks))


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_file_is_held_in_memory(tmp_path: Path) -> None:
    got, piece = tmp_path / "got", bytes(MIB)
    wire = Wire(whole(*[piece] * 32), httpx.Response(202, json=JOB))
    with wire.client() as client:
        assert peak_of(lambda: client.export_adapter("adp_1", got)) < 8 * MIB
        assert got.stat().st_size == 32 * MIB
        assert peak_of(lambda: client.import_adapter(got)) < 8 * MIB
    assert wire.sent == [0, 32 * MIB]
    assert wire.heads[1]["content-length"] == str(32 * MIB)
    assert "transfer-encoding" not in wire.heads[1]


def test_a_broken_download_begins_anew(tmp_path: Path) -> None:
    wire = Wire(whole(b"a torn be", breaks=True), whole(b"new ", b"file"))
    with wire.client() as client:
        assert client.export_adapter("adp_1", tmp_path / "file") == 8
    assert (tmp_path / "file").read_bytes() == b"new file"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert wire.slept_s == [FIRST_RESEND_S]


def test_what_stays_torn_is_not_kept(tmp_path: Path) -> None:
    refused = httpx.Response(410, json={"error": {"message": "gone", "code": "adapter_evicted"}})
    torn = [whole(b"torn", breaks=True) for _ in range(MAX_RESENDS + 1)]
    wire = Wire(*torn, refused)
    with wire.client() as client:
        with pytest.raises(ServerUnreachableError, match="broke: reset"):
            client.export_adapter("adp_1", tmp_path / "file")
        with pytest.raises(ApiError, match="gone"):
            client.export_adapter("adp_1", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    there, wire = tmp_path / "file", Wire(whole(b"another"))
    there.write_bytes(b"mine")

    class Late(Body):
        def __iter__(self) -> Iterator[bytes]:
            (tmp_path / "late").write_bytes(b"came meanwhile")
            yield b"another"

    wire.replies.append(httpx.Response(200, stream=Late()))
    with wire.client() as client:
        with pytest.raises(FileExistsError, match="file"):
            client.export_adapter("adp_1", there)
        assert wire.sent == []  # before anything is asked
        wire.replies.pop(0)
        with pytest.raises(FileExistsError, match="late"):
            client.export_adapter("adp_1", tmp_path / "late")
    assert there.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "late"]


def test_a_file_that_is_not_there_is_not_sent(tmp_path: Path) -> None:
    wire = Wire()
    with wire.client() as client, pytest.raises(FileNotFoundError):
        client.import_adapter(tmp_path / "missing")
    assert wire.sent == []


@pytest.mark.anyio
async def test_the_same_for_asyncio(tmp_path: Path) -> None:
    got = tmp_path / "got"
    busy = httpx.Response(
        503, json={"error": {"message": "full", "code": "queue_full"}}, headers={"Retry-After": "2"}
    )
    replies: tuple[Any, ...] = (whole(b"torn", breaks=True), whole(b"a whole ", b"file"))
    wire = Wire(*replies, busy, httpx.Response(202, json=JOB))
    async with wire.async_client() as client:
        assert await client.export_adapter("adp_1", got) == 12
        with pytest.raises(FileExistsError):
            await client.export_adapter("adp_1", got)
        made = await client.import_adapter(str(got))
    assert (made.id, got.read_bytes()) == ("adp_1", b"a whole file")
    assert wire.sent == [0, 0, 12, 12]  # from the file's beginning each time
    keys = {head["idempotency-key"] for head in wire.heads[2:]}
    assert len(keys) == 1
    assert wire.slept_s == [FIRST_RESEND_S, 2.0]
