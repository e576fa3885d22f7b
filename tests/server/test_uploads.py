"""Files sent to `/v1/documents`, read by a process of its own that cannot take the server down."""

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import docx
import httpx
import psutil
import pypdf
import pytest
from pypdf.generic import DictionaryObject, NameObject, StreamObject

from imprint.server.config import Settings

pytestmark = pytest.mark.anyio
PATH = "/v1/documents"


def word(text: str) -> bytes:
    document = docx.Document()
    document.add_heading(text, 1)
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def flate_bomb(num_bytes: int) -> bytes:
    """A PDF whose one page unpacks to so many bytes of operators."""
    writer = pypdf.PdfWriter()
    stream = StreamObject()
    stream.set_data(b"(x) Tj " * (num_bytes // 7))
    page = writer.add_blank_page(9, 9)
    page[NameObject("/Contents")] = writer._add_object(stream.flate_encode(1))
    resources = DictionaryObject({NameObject("/Font"): DictionaryObject()})
    page[NameObject("/Resources")] = resources
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


async def send(
    client: httpx.AsyncClient,
    data: bytes,
    *,
    name: str = "a.txt",
    media_type: str = "application/octet-stream",
    status: int = 201,
    **fields: str,
) -> dict[str, Any]:
    files = {"file": (name, data, media_type)}
    response = await client.post(PATH, files=files, data=fields)
    assert response.status_code == status, response.text
    reply: dict[str, Any] = response.json()
    return reply["error"] if status >= 400 else reply


async def test_a_file_becomes_a_document(client: httpx.AsyncClient) -> None:
    more = {"metadata": json.dumps({"a": "b"}), "expires_after_s": "60"}
    made = await send(client, word("Harbor"), name="C:\\x\\report.docx", **more)
    assert (made["title"], made["num_references"], made["metadata"]) == (
        *("report.docx", 1),
        {"a": "b"},
    )
    assert made["expires_at"] == pytest.approx(made["created_at"] + 60)
    assert made["media_type"].endswith("wordprocessingml.document")
    content = (await client.get(f"{PATH}/{made['id']}/content")).json()
    assert content["text"] == "Harbor\n"
    section = {"kind": "section", "number": 1, "level": 1, "start": 0, "end": 7}
    assert content["references"] == [section]


@pytest.mark.parametrize(
    ("name", "media_type", "found"),
    [
        ("a.md", "text/plain", "text/markdown"),
        ("a", "text/html; charset=utf-8", "text/html"),
        ("../../etc/passwd.txt", "application/x-sh", "text/plain"),
        ("a.exe", "text/plain", "text/plain"),
    ],
)
async def test_the_ending_says_how_a_file_is_read(
    client: httpx.AsyncClient, name: str, media_type: str, found: str
) -> None:
    made = await send(client, b"hello", name=name, media_type=media_type, title="t")
    assert (made["media_type"], made["title"]) == (found, "t")


async def test_wrong_uploads(client: httpx.AsyncClient) -> None:
    error = await send(client, b"MZ", name="a.exe", status=415)
    assert (error["code"], error["param"]) == ("unsupported_media_type", "file")
    error = await send(client, b"not a pdf", name="a.pdf", status=400)
    assert (error["code"], error["param"]) == ("document_damaged", "file")
    error = await send(client, b"PK\x03\x04broken", name="a.docx", status=400)
    assert error["code"] == "document_damaged"
    assert (await send(client, b"", status=400))["code"] == "document_empty"
    assert (await send(client, b"x", status=400, metadata="{"))["param"] == "metadata"
    assert (await send(client, b"x", status=400, metadata="[1]"))["param"] == "metadata"
    assert (await send(client, b"x", status=400, nonsense="1"))["code"] == "unknown_parameter"
    assert (await send(client, b"x", status=400, title="x" * 70_000))["type"]
    two = [("file", ("a.txt", b"a")), ("file", ("b.txt", b"b"))]
    assert (await client.post(PATH, files=two)).status_code == 400
    assert (await client.post(PATH, files={"other": b"a"})).json()["error"]["param"] == "other"
    none = await client.post(PATH, files={"title": (None, "t")})
    assert none.json()["error"]["code"] == "missing_parameter"
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    for headers in (broken, {"Content-Type": "multipart/form-data"}):
        response = await client.post(PATH, content=b"--y\r\n\r\n", headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (
            *(400,),
            "invalid_request_error",
        )


@pytest.fixture
def processes() -> Callable[[], set[psutil.Process]]:
    """Those of extractions: what other tests have left running in this process is not counted."""
    before = set(psutil.Process().children(recursive=True))
    return lambda: set(psutil.Process().children(recursive=True)) - before


async def test_a_bomb_ends_its_own_process_only(
    serve: Any, settings: Settings, pool: Any, processes: Callable[[], set[psutil.Process]]
) -> None:
    short = settings.model_copy(update={"extraction_timeout_s": 2.0})
    async with serve(short, pool) as client:
        error = await send(client, flate_bomb(100 * 2**20), name="a.pdf", status=413)
        assert error["code"] == "document_too_large"
        slow = flate_bomb(8 * 2**20)
        sending = asyncio.create_task(send(client, slow, name="a.pdf", status=400))
        live = await client.get("/health/live")
        assert live.elapsed.total_seconds() < 1, "the event loop does not parse"
        assert (await sending)["code"] == "document_too_complex"
        assert not processes()


async def test_a_client_that_goes_takes_its_process_along(
    client: Any, processes: Callable[[], set[psutil.Process]]
) -> None:
    sending = asyncio.create_task(send(client, flate_bomb(8 * 2**20), name="a.pdf"))
    while not processes():
        await asyncio.sleep(0.005)
    sending.cancel()
    async with asyncio.timeout(10):
        while processes():
            await asyncio.sleep(0.005)
