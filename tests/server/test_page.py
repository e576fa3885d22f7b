"""The page as files: served by exact name under a strict policy, and written to stand it."""

import re
from pathlib import Path

import httpx
import pytest

from imprint.server.routes.page import CONTENT_SECURITY_POLICY, FOLDER

pytestmark = pytest.mark.anyio

FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ["/", *[f"/static/{name}" for name in FILES]])
async def test_every_file_comes_under_the_policy(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.text == read(path.removeprefix("/static/") if path != "/" else "index.html")
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    again = await client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_policy_allows_this_server_alone_and_nothing_inline() -> None:
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["trusted-types"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'", "'script'"}


@pytest.mark.parametrize("name", ["nope.js", "..%2fconfig.py", "%2e%2e/config.py", "a/b", "index"])
async def test_nothing_else_is_served(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/static/{name}")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_referred_to_is_there() -> None:
    wanted = set(re.findall(r'(?:src|href)="/static/([^"]+)"', read("index.html")))
    for name in SCRIPTS:
        wanted |= set(re.findall(r'from "\./([^"]+)"', read(name)))
        wanted |= set(re.findall(r'"/static/([^"]+)"', read(name)))
    assert wanted | {"index.html"} == set(FILES)


def test_markup_holds_no_script_and_no_style() -> None:
    html = read("index.html")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    pointed = re.findall(r'(?:for|aria-labelledby|aria-describedby)="([^"]+)"', html)
    assert set(pointed) <= {*ids, "study-title"}  # that one is made with each study


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_make_no_markup_of_strings(name: str) -> None:
    code = read(name)
    makers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|Function\("
    assert not re.search(makers, code)
    assert not re.search(r"https?://", code.replace(SVG_NAMESPACE, ""))
    assert not re.search(r"localStorage|document\.cookie", code)  # a key ends with its tab
    assert len(code.splitlines()) <= 320


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".css")])
def test_styles_load_nothing(name: str) -> None:
    assert not re.search(r"url\(|@import", read(name))


def test_the_example_is_the_one_of_the_readme() -> None:
    root = Path(__file__).resolve().parents[2]
    assert read("example.txt") == (root / "deploy/examples/harbor.txt").read_text(encoding="utf-8")
