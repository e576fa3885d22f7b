"""Who may see the page, and how: keys, keyboards, small and dark screens, hostile documents."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EVIL = (
    '<img src=x onerror="alert(1)"></script><script>alert(2)</script> &amp; <b>bold</b> '
    "\u202egnp.exe\u202c \u2066a\u2069 مرحبا עברית 漢字\r\n"
) * 3


def test_a_hostile_document_is_text_and_nothing_else(open_page: Callable[..., Any]) -> None:
    watched = open_page(viewport={"width": 360, "height": 740})
    page, expect = watched.page, watched.expect
    page.get_by_label("Title").fill("<img src=x onerror=alert(3)>\u202egnp")
    page.get_by_role("textbox", name="Document").evaluate(
        "(field, text) => { field.value = text }", EVIL
    )
    watched.study(steps=1)
    expect(page.locator(".verdict")).to_be_visible(timeout=60_000)
    expect(page.locator(".mark").first).to_be_visible()
    assert page.locator("main :is(img, script, b, i)").count() == 0
    shown = page.locator(".heat-text").text_content()
    assert '<img src=x onerror="alert(1)"></script><script>' in shown
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in shown
    assert not set("\u202e\u202c\u2066\u2069") & set(page.locator("body").text_content())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    watched.check_accessible()
    watched.ask("<script>alert(4)</script>", focus=False)
    assert page.locator("main script").count() == 0


def test_a_key_is_asked_for_and_ends_with_the_tab(open_page: Callable[..., Any], key: str) -> None:
    watched = open_page(key="")
    watched.allowed = ("status of 401",)
    page, expect = watched.page, watched.expect
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_role("alert")).to_contain_text("no API key")
    dialog.get_by_label("Key", exact=True).fill("sk-wrong-0123456789abc")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog.get_by_role("alert")).to_contain_text("not one of this server's")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_label("Key", exact=True).press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Study it")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    assert watched.context.cookies() == []
    other = watched.context.new_page()
    other.goto("/")
    expect(other.get_by_role("dialog", name="API key")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_empty_page_is_accessible(
    open_page: Callable[..., Any], scheme: str, width: int
) -> None:
    watched = open_page(color_scheme=scheme, viewport={"width": width, "height": 740})
    page = watched.page
    watched.expect(page.get_by_role("button", name="Study it")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for role in ("banner", "navigation", "main"):
        assert page.get_by_role(role).count() == 1
    watched.check_accessible()
    order = []
    for _ in range(4):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert order == ["Skip to the content", "Imprint", "API key", "New"]
