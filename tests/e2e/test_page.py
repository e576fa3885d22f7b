"""The page as a person uses it: a headless Chromium, a real server, the bundled model.

Whatever a page logs as an error, throws, asks of another host or is refused by its policy fails the
test. Limit: Debian's `chromium`, by its path; without it, or without Playwright, all of it skips.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KEY = "sk-page-0123456789abcdef"
READY_S = 60.0
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A function that opens a page of this size; all in one browser with an empty profile."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra's playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    sync_api.expect.set_options(timeout=20_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=ARGUMENTS, env={"HOME": str(profile)}
        )
        yield browser
        browser.close()


class Watched:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.allowed: tuple[str, ...] = ()
        """Parts of console lines that a test expects: Chromium logs every status from 400 on."""
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.wrong.append(f"thrown: {error}"))
        self.page.on("dialog", self._asked)
        self.page.on("request", self._requested)
        self._url = url

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text}")

    def _asked(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self._url, "blob:")):
            self.wrong.append(f"another host: {request.url}")

    def close(self) -> None:
        """Ends the page; fails for everything that went wrong and was not expected."""
        self.context.close()
        left = [line for line in self.wrong if not any(part in line for part in self.allowed)]
        assert left == []


@contextmanager
def serving(data: Path) -> Iterator[str]:
    """A server with one key on the bundled model; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "IMPRINT_PORT": str(port),
        "IMPRINT_DATA_DIR": str(data),
        "IMPRINT_API_KEYS": f"page:{KEY}",
        "IMPRINT_LOG_LEVEL": "warning",
    }
    command = [sys.executable, "-m", "imprint.server.cli", "serve"]
    with subprocess.Popen(command, env=environment) as process:
        try:
            deadline = time.monotonic() + READY_S
            while not _ready(url):
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, f"not ready after {READY_S} s"
                time.sleep(0.1)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=45) == 0
        finally:
            process.kill()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("page") / "data") as address:
        yield address


@pytest.fixture
def api(url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Callable[..., Watched]]:
    """Opens pages, with the key unless told otherwise; they are checked and closed at the end."""
    opened: list[Watched] = []

    def make(path: str = "/", *, key: str = KEY, **options: Any) -> Watched:
        watched = Watched(browser, url, **options)
        opened.append(watched)
        if key:
            script = f"sessionStorage.setItem('imprint-api-key', {json.dumps(key)})"
            watched.context.add_init_script(script)
        watched.page.goto(path)
        return watched

    yield make
    for watched in opened:
        watched.close()


# ---- tests ---------------------------------------------------------------------------------------

QUESTION = "What is the access code of the boathouse?"
EVIL = (
    '<img src=x onerror="alert(1)"></script><script>alert(2)</script> &amp; <b>bold</b> '
    "\u202egnp.exe\u202c \u2066a\u2069 مرحبا עברית 漢字\r\n"
) * 3


def study(page: Any, *, steps: int, seed: int = 0) -> None:
    """Send the form's document, to be studied in this many steps."""
    page.get_by_text("Settings of the study").click()
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Study it").click()


def test_a_document_from_its_pasting_to_its_deletion(
    open_page: Callable[..., Watched], api: httpx.Client
) -> None:
    page = open_page().page
    expect = sync_api().expect
    expect(page.locator("#list-note")).to_have_text("None yet.")
    page.get_by_role("button", name="Study it").click()
    expect(page.get_by_role("alert")).to_contain_text("There is no text yet")
    page.get_by_role("button", name="Use the example").click()
    expect(page.get_by_role("textbox", name="Document")).to_have_value(
        re.compile("^The harbor at Sandwick")
    )
    study(page, steps=3)
    # it is watched: its reading, then each step
    expect(page.get_by_role("heading", level=1)).to_have_text("The harbour (example)")
    curves = page.get_by_role("img", name=re.compile("after step 3"))
    expect(curves).to_have_count(4, timeout=60_000)
    expect(page.locator(".verdict")).to_be_visible(timeout=60_000)
    expect(page.locator(".verdict")).to_contain_text("the right next token became")
    text = (ROOT / "deploy/examples/harbor.txt").read_text(encoding="utf-8")
    expect(page.locator(".t.h9").first).to_be_attached()
    assert page.locator(".heat-text").text_content() == text
    # a position by the keyboard: its rollouts stand beside the truth
    (tried,) = api.get(f"/v1/adaptations/{id_of(page)}/study?after=2").json()["data"]
    marks = page.locator(".mark")
    expect(marks).to_have_count(len(tried["positions"]))
    marks.nth(1).focus()
    shown = page.get_by_role("region", name="Rollouts at a position")
    expect(shown).to_contain_text("Position 2 of")
    expect(shown.locator(".truth")).to_contain_text(tried["positions"][1]["truth"].strip()[:12])
    expect(shown.locator("li")).to_have_count(len(tried["positions"][1]["rollouts"]))
    page.get_by_role("slider", name="Step").press("Home")
    expect(page.locator(".step-row output")).to_have_text("1 of 3")
    # ask
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_label("Your question").press("Enter")
    answer = page.get_by_role("article", name=f"Answers to: {QUESTION}")
    expect(answer.locator(".verdict-line")).to_have_count(2, timeout=60_000)
    expect(answer.locator(".column").nth(1).locator(".output")).to_contain_text("7308452")
    expect(answer.locator(".column").nth(1)).to_contain_text("Studied for this question in 8 steps")
    expect(answer.locator(".column").nth(0)).to_contain_text("nchanged model")
    # what was learned, as a file
    with page.expect_download() as download:
        page.get_by_role("button", name="Export adapter").click()
    exported = api.get(f"/v1/adaptations/{id_of(page)}/adapter")
    assert download.value.suggested_filename == f"{id_of(page)}.safetensors"
    assert Path(download.value.path()).read_bytes() == exported.content
    # the list, and a look back
    entry = page.get_by_role("navigation").get_by_role("link", name=re.compile("The harbour"))
    expect(entry).to_contain_text("1,184 tokens · 4.2 kB")
    expect(entry).to_have_attribute("aria-current", "page")
    page.reload()
    expect(page.locator(".mark").first).to_be_visible()
    # delete
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("from memory and from disk")
    page.get_by_role("button", name="Keep it").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#list-note")).to_have_text("None yet.")
    expect(page.get_by_role("heading", level=1)).to_have_text("Let the model study a document")
    for kind in ("documents", "adaptations"):
        assert api.get(f"/v1/{kind}").json()["data"] == []


def test_an_imported_adapter_is_asked(open_page: Callable[..., Watched], api: httpx.Client) -> None:
    text = (ROOT / "deploy/examples/harbor.txt").read_text(encoding="utf-8")
    asked = {"document": text, "questions": [QUESTION], "focus": False, "method": {"type": "read"}}
    made = api.post("/v1/answers", json=asked).json()
    path = f"/v1/adaptations/{made['adaptation']['id']}"
    file, header = api.get(f"{path}/adapter").content, {"Content-Type": "application/octet-stream"}
    id = api.post("/v1/adapters", content=file, headers=header).json()["id"]
    page, expect = open_page(f"/#/{id}").page, sync_api().expect
    expect(page.locator(".verdict")).to_contain_text("Imported", timeout=60_000)
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_label("Your question").press("Enter")
    answer = page.get_by_role("article", name=f"Answers to: {QUESTION}")
    expect(answer.locator(".verdict-line")).to_have_count(2, timeout=60_000)
    expect(answer.locator(".column").nth(0)).to_contain_text("no text of the document")
    expect(answer.locator(".column").nth(1).locator(".output")).not_to_be_empty()
    assert {api.delete(used).status_code for used in (path, f"/v1/adaptations/{id}")} == {200}


def test_a_hostile_document_is_text_and_nothing_else(open_page: Callable[..., Watched]) -> None:
    page = open_page(viewport={"width": 360, "height": 740}).page
    expect = sync_api().expect
    page.get_by_label("Title").fill("<img src=x onerror=alert(3)>\u202egnp")
    page.get_by_role("textbox", name="Document").evaluate(
        "(field, text) => { field.value = text }", EVIL
    )
    study(page, steps=1)
    expect(page.locator(".verdict")).to_be_visible(timeout=60_000)
    expect(page.locator(".mark").first).to_be_visible()
    assert page.locator("main :is(img, script, b, i)").count() == 0
    shown = page.locator(".heat-text").text_content()
    assert '<img src=x onerror="alert(1)"></script><script>' in shown
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in shown
    assert not set("\u202e\u202c\u2066\u2069") & set(page.locator("body").text_content())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    check_accessible(page)
    page.get_by_label("Your question").fill("<script>alert(4)</script>")
    page.get_by_label("Study the document for this question").uncheck()
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".verdict-line")).to_have_count(2, timeout=60_000)
    assert page.locator("main script").count() == 0


def test_a_large_file_is_watched_and_cancelled(
    open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    page = open_page().page
    expect = sync_api().expect
    file = tmp_path / "one_line.txt"
    file.write_text("the sea was calm and the boats were out " * 25_000, encoding="utf-8")
    page.locator("#file").set_input_files(file)
    expect(page.locator("#attached")).to_contain_text("one_line.txt")
    expect(page.locator("#text-note")).to_have_text("1,000,000 characters")
    page.get_by_role("button", name="Study it").click()
    expect(page.locator(".under-way")).to_contain_text("Reading the document", timeout=60_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".verdict")).to_contain_text("Cancelled", timeout=30_000)
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Let the model study a document")


def test_a_file_that_is_no_plain_text_is_sent_as_it_is(
    open_page: Callable[..., Watched], api: httpx.Client, tmp_path: Path
) -> None:
    page = open_page().page
    expect = sync_api().expect
    file = tmp_path / "notes.html"
    file.write_text("<h1>The quay</h1><p>The bell is <b>cracked</b>. " + "It rang. " * 30)
    page.locator("#file").set_input_files(file)
    expect(page.locator("#attached")).to_contain_text("notes.html")
    study(page, steps=1)
    expect(page.locator(".heat-text")).to_contain_text("The bell is cracked.", timeout=60_000)
    (entry, *_) = api.get("/v1/documents").json()["data"]
    assert (entry["title"], entry["media_type"]) == ("notes.html", "text/html")


def test_a_key_is_asked_for_and_ends_with_the_tab(open_page: Callable[..., Watched]) -> None:
    watched = open_page(key="")
    watched.allowed = ("status of 401",)
    page, expect = watched.page, sync_api().expect
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_role("alert")).to_contain_text("no API key")
    dialog.get_by_label("Key", exact=True).fill("sk-wrong-0123456789abc")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog.get_by_role("alert")).to_contain_text("not one of this server's")
    dialog.get_by_label("Key", exact=True).fill(KEY)
    dialog.get_by_label("Key", exact=True).press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Study it")).to_be_visible()
    assert page.evaluate("localStorage.length") == 0
    assert watched.context.cookies() == []
    other = watched.context.new_page()
    other.goto("/")
    expect(other.get_by_role("dialog", name="API key")).to_be_visible()


def test_an_unknown_study_is_said_to_be_one(open_page: Callable[..., Watched]) -> None:
    watched = open_page("/#/adp_nope")
    watched.allowed = ("status of 404",)
    alert = watched.page.locator("#study").get_by_role("alert")
    sync_api().expect(alert).to_contain_text("There is no such study")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_empty_page_is_accessible(
    open_page: Callable[..., Watched], scheme: str, width: int
) -> None:
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 740}).page
    sync_api().expect(page.get_by_role("button", name="Study it")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for role in ("banner", "navigation", "main"):
        assert page.get_by_role(role).count() == 1
    check_accessible(page)
    order = []
    for _ in range(4):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert order == ["Skip to the content", "Imprint", "API key", "New"]


def test_no_more_is_loaded_than_is_looked_at(open_page: Callable[..., Watched]) -> None:
    """A reading of 60,000 tokens, made up between browser and server, is scrolled through."""
    watched = open_page()
    page, expect = watched.page, sync_api().expect
    page.get_by_role("button", name="Use the example").click()
    study(page, steps=1, seed=1)
    expect(page.locator(".verdict")).to_be_visible(timeout=60_000)
    asked: list[int] = []

    def pages(route: Any) -> None:
        after, limit = (int(n) for n in re.findall(r"=(\d+)", route.request.url))
        asked.append(after)
        num = min(limit, 60_000 - after)
        texts = [f"w{after + i} " for i in range(num)]
        body = {"texts": texts, "entropies": [i % 7 for i in range(num)], "first": after}
        route.fulfill(json={**body, "num_tokens": 60_000, "has_more": after + num < 60_000})

    page.route("**/study/tokens?*", pages)
    page.reload()
    expect(page.locator(".heat-text")).to_contain_text("w100 ")
    assert page.locator(".t").count() < 8000
    for _ in range(3):
        num = page.locator(".t").count()
        page.locator(".heat-box").evaluate("(box) => { box.scrollTop = box.scrollHeight }")
        expect(page.locator(".t").nth(num)).to_be_attached()
    assert asked == sorted(set(asked))
    assert max(asked) < 30_000


def id_of(page: Any) -> str:
    return str(page.url.rpartition("/")[2])


def sync_api() -> Any:
    return pytest.importorskip("playwright.sync_api")


def check_accessible(page: Any) -> None:
    """Names, ids, headings and contrast (4.5 to 1) of everything that is visible."""
    code = Path(__file__).with_name("accessibility.js").read_text(encoding="utf-8")
    assert page.evaluate(code) == []
