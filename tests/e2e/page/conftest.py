"""The page as a person uses it: a headless Chromium, a real server, the bundled model.

Whatever a page logs as an error, throws, asks of another host or is refused by its policy fails the
test. Every test has a key of its own, so it begins with an empty list. Limit: Debian's `chromium`,
by its path; without it, or without Playwright, all of it skips.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.live_server import LiveServer

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-smooth-scrolling",  # where a key leads to is seen at once, on a busy machine too
]
KEYS = [f"sk-page-{number:02}-0123456789abcdef" for number in range(40)]
EXAMPLE = Path(__file__).resolve().parents[3] / "deploy" / "examples" / "harbor.txt"


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A function that opens a page of this size; all in one browser with an empty profile."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra's playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=ARGUMENTS, env={"HOME": str(profile)}
        )
        yield browser
        browser.close()


class Watched:
    """A page, and what went wrong on it. `expect` is Playwright's."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.expect = pytest.importorskip("playwright.sync_api").expect
        self.context = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(60_000)
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

    @property
    def id(self) -> str:
        """The adaptation that is shown."""
        return str(self.page.url.rpartition("/")[2])

    def study(self, *, steps: int, seed: int = 0) -> None:
        """Send the form's document, to be studied in this many steps."""
        self.page.get_by_text("Settings of the study").click()
        self.page.get_by_label("Steps").fill(str(steps))
        self.page.get_by_label("Seed").fill(str(seed))
        self.page.get_by_role("button", name="Study it").click()

    def ask(self, question: str, *, focus: bool = True) -> Any:
        """Ask; the article with both answers, once they are there."""
        if not focus:
            self.page.get_by_label("Study the document for this question").uncheck()
        self.page.get_by_label("Your question").fill(question)
        self.page.get_by_label("Your question").press("Enter")
        answer = self.page.get_by_role("article", name=f"Answers to: {question}")
        self.expect(answer.locator(".verdict-line")).to_have_count(2, timeout=60_000)
        return answer

    def delete(self) -> None:
        """Delete what is shown."""
        self.page.get_by_role("button", name="Delete", exact=True).click()
        self.page.get_by_role("dialog").get_by_role("button", name="Delete").click()

    def check_accessible(self) -> None:
        """Names, ids, headings and contrast (4.5 to 1) of everything that is visible."""
        code = Path(__file__).with_name("accessibility.js").read_text(encoding="utf-8")
        assert self.page.evaluate(code) == []

    def close(self) -> None:
        """Ends the page; fails for everything that went wrong and was not expected."""
        self.context.close()
        left = [line for line in self.wrong if not any(part in line for part in self.allowed)]
        assert left == []


@contextmanager
def serving(data: Path) -> Iterator[str]:
    """A server with all these keys on the bundled model; its address."""
    keys = ",".join(f"page{i}:{key}" for i, key in enumerate(KEYS))
    with LiveServer(data, env={"IMPRINT_API_KEYS": keys}) as server:
        server.wait_until_ready()
        yield server.url
        server.process.terminate()
        assert server.process.wait(timeout=45) == 0


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="package")
def url(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("page") / "data") as address:
        yield address


@pytest.fixture(scope="package")
def unused_keys() -> Iterator[str]:
    return iter(KEYS)


@pytest.fixture
def key(unused_keys: Iterator[str]) -> str:
    """A key that owns nothing yet."""
    return next(unused_keys)


@pytest.fixture
def api(url: str, key: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def example() -> str:
    """The text of the example document."""
    return EXAMPLE.read_text(encoding="utf-8")


@pytest.fixture
def read(api: httpx.Client, example: str) -> str:
    """Id of the example, read and not studied: the quickest thing that has a text."""
    body = {"document": example, "questions": ["?"], "focus": False, "max_tokens": 1}
    made = api.post("/v1/answers", json={**body, "method": {"type": "read"}}).json()
    return str(made["adaptation"]["id"])


Open = Callable[..., Watched]


@pytest.fixture
def open_page(browser: Any, url: str, key: str) -> Iterator[Open]:
    """Opens pages, with the key unless told otherwise; they are checked and closed at the end."""
    opened: list[Watched] = []

    def make(path: str = "/", *, key: str = key, **options: Any) -> Watched:
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
