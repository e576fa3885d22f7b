"""A document is sent and watched while it is studied: forms, progress, steps, cancelling."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow


def test_the_example_is_watched_while_it_is_studied(
    open_page: Callable[..., Any], api: httpx.Client, example: str
) -> None:
    watched = open_page()
    page, expect = watched.page, watched.expect
    expect(page.locator("#list-note")).to_have_text("None yet.")
    page.get_by_role("button", name="Study it").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no text yet")
    page.get_by_role("button", name="Use the example").click()
    expect(page.get_by_role("textbox", name="Document")).to_have_value(
        re.compile("^The harbor at Sandwick")
    )
    watched.study(steps=3)
    expect(page.get_by_role("heading", level=1)).to_have_text("The harbour (example)")
    curves = page.get_by_role("img", name=re.compile("after step 3"))
    expect(curves).to_have_count(4, timeout=60_000)
    expect(page.locator(".verdict")).to_be_visible(timeout=60_000)
    expect(page.locator(".verdict")).to_contain_text("the right next token became")
    expect(page.locator(".t.h9").first).to_be_attached()
    page.locator(".heat-end").scroll_into_view_if_needed()  # the second page, too, is filled
    expect(page.locator(".heat-page.away")).to_have_count(0)
    assert page.locator(".heat-text").text_content() == example
    # a position by the keyboard: its rollouts stand beside the truth
    (tried,) = api.get(f"/v1/adaptations/{watched.id}/study?after=2").json()["data"]
    marks = page.locator(".mark")
    expect(marks).to_have_count(len(tried["positions"]))
    marks.nth(1).focus()
    shown = page.get_by_role("region", name="Rollouts at a position")
    expect(shown).to_contain_text("Position 2 of")
    expect(shown.locator(".truth")).to_contain_text(
        tried["positions"][1]["truth"].strip().replace("\n", "\u21b5")[:12]
    )
    expect(shown.locator("li")).to_have_count(len(tried["positions"][1]["rollouts"]))
    page.get_by_role("slider", name="Step").press("Home")
    expect(page.locator(".step-row output")).to_have_text("1 of 3")
    # the list, and a look back
    entry = page.get_by_role("navigation").get_by_role("link", name=re.compile("The harbour"))
    expect(entry).to_contain_text("1,184 tokens · 4.2 kB")
    expect(entry).to_have_attribute("aria-current", "page")
    page.reload()
    expect(page.locator(".mark").first).to_be_visible()


def test_a_large_file_is_watched_and_cancelled(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    watched = open_page()
    page, expect = watched.page, watched.expect
    file = tmp_path / "one_line.txt"
    file.write_text("the sea was calm and the boats were out " * 25_000, encoding="utf-8")
    page.locator("#file").set_input_files(file)
    expect(page.locator("#attached")).to_contain_text("one_line.txt")
    expect(page.locator("#text-note")).to_have_text("1,000,000 characters")
    page.get_by_role("button", name="Study it").click()
    expect(page.locator(".under-way")).to_contain_text("Reading the document", timeout=60_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".verdict")).to_contain_text("Cancelled", timeout=30_000)
    watched.delete()
    expect(page.get_by_role("heading", level=1)).to_have_text("Let the model study a document")


def test_a_file_that_is_no_plain_text_is_sent_as_it_is(
    open_page: Callable[..., Any], api: httpx.Client, tmp_path: Path
) -> None:
    watched = open_page()
    page, expect = watched.page, watched.expect
    file = tmp_path / "notes.html"
    file.write_text("<h1>The quay</h1><p>The bell is <b>cracked</b>. " + "It rang. " * 30)
    page.locator("#file").set_input_files(file)
    expect(page.locator("#attached")).to_contain_text("notes.html")
    watched.study(steps=1)
    expect(page.locator(".heat-text")).to_contain_text("The bell is cracked.", timeout=60_000)
    (entry,) = api.get("/v1/documents").json()["data"]
    assert (entry["title"], entry["media_type"]) == ("notes.html", "text/html")


def test_an_unknown_study_is_said_to_be_one(open_page: Callable[..., Any]) -> None:
    watched = open_page("/#/adp_nope")
    watched.allowed = ("status of 404",)
    alert = watched.page.locator("#study").get_by_role("alert")
    watched.expect(alert).to_contain_text("There is no such study")


@pytest.mark.parametrize(
    ("selection", "alpha", "judged", "used", "marks"),
    [
        (
            "write",
            0.5,
            "its memory wrote most strongly",
            "50 % of what was learned",
            "memory wrote",
        ),
        ("write", 0.25, "its memory wrote most strongly", "With 50 % of what was", "memory wrote"),
        ("entropy", 1.0, "took no part in the study", "use what was learned.", "was unsure."),
    ],
)
def test_the_words_are_those_of_the_method(
    open_page: Callable[..., Any], selection: str, alpha: float, judged: str, used: str, marks: str
) -> None:
    method = {"type": "refine", "selection": selection, "held_steps": 4}
    method |= {"blend_factors": [0.5, 0.25] if selection == "write" else [1.0]}
    result = {"alpha": alpha, "probe_gain_nats": 0.5, "probe_before": 3.0}
    adaptation = {"status": "succeeded", "method": method, "result": result}
    code = """async (adaptation) => {
      const words = await import("/static/words.js");
      return [words.verdict(adaptation).text, words.positions(adaptation.method)];
    }"""
    text, where = open_page().page.evaluate(code, adaptation)
    assert judged in text
    assert used in text
    assert marks in where
