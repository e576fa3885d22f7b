"""What was studied is asked, taken away as a file, brought back, and deleted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

QUESTION = "What is the access code of the boathouse?"


def test_both_answers_stand_side_by_side(
    open_page: Callable[..., Any], api: httpx.Client, read: str
) -> None:
    watched = open_page(f"/#/{read}")
    columns = watched.ask(QUESTION).locator(".column")
    watched.expect(columns.nth(0)).to_contain_text("nchanged model")
    watched.expect(columns.nth(1).locator(".output")).to_contain_text("7308452")
    watched.expect(columns.nth(1)).to_contain_text("Studied for this question in 8 steps")


def test_an_adapter_is_exported_and_the_document_deleted(
    open_page: Callable[..., Any], api: httpx.Client, example: str
) -> None:
    document = api.post("/v1/documents", json={"text": example, "title": "The harbour"}).json()
    body = {"document_id": document["id"], "method": {"type": "read"}}
    id = api.post("/v1/adaptations", json=body).json()["id"]
    watched = open_page(f"/#/{id}")
    page, expect = watched.page, watched.expect
    with page.expect_download() as download:
        page.get_by_role("button", name="Export adapter").click(timeout=60_000)
    assert download.value.suggested_filename == f"{id}.safetensors"
    exported = api.get(f"/v1/adaptations/{id}/adapter").content
    assert Path(download.value.path()).read_bytes() == exported
    # not at once: a question is asked first
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("from memory and from disk")
    page.get_by_role("button", name="Keep it").click()
    watched.delete()
    expect(page.locator("#list-note")).to_have_text("None yet.")
    expect(page.get_by_role("heading", level=1)).to_have_text("Let the model study a document")
    for kind in ("documents", "adaptations"):
        assert api.get(f"/v1/{kind}").json()["data"] == []


def test_an_imported_adapter_is_asked(
    open_page: Callable[..., Any], api: httpx.Client, read: str
) -> None:
    file = api.get(f"/v1/adaptations/{read}/adapter").content
    header = {"Content-Type": "application/octet-stream"}
    id = api.post("/v1/adapters", content=file, headers=header).json()["id"]
    watched = open_page(f"/#/{id}")
    watched.expect(watched.page.locator(".verdict")).to_contain_text("Imported", timeout=60_000)
    columns = watched.ask(QUESTION).locator(".column")
    watched.expect(columns.nth(0)).to_contain_text("no text of the document")
    watched.expect(columns.nth(1).locator(".output")).not_to_be_empty()
