"""The documentation holds what the code says: generated pages, links, flags, variables, codes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imprint.server.config import options
from imprint.server.error_codes import ERROR_CODES
from imprint.server.errors import STATUS_CODES
from imprint.server.metrics import Metrics
from imprint.server.reference import PAGES

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES_OF_PEOPLE = [path for path in DOCS if path.parent.name != "reference"]
READ = [ROOT / "README.md", *DOCS]
CODE = re.compile(r"[a-z]+(_[a-z]+)+")
# Where a call's code is: by its keyword, or at this place among its arguments.
PLACES = {"AdaptationError": 0, "WorkFailedError": 0, "_refuse": 1, "refuse": 1, "fail": 1}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", PAGES)
def test_reference_is_what_the_code_says(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "run: make docs"


def test_reference_has_no_other_pages() -> None:
    assert {path.name for path in (ROOT / "docs" / "reference").iterdir()} == set(PAGES)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", READ, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES_OF_PEOPLE, ids=ids)
def test_variables_and_metrics_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = {option.env for option in options()}
    assert sorted(set(re.findall(r"\bIMPRINT_[A-Z_]+\b", text)) - known) == []
    declared = {f"imprint_{name}" for name in Metrics().declared}
    named = set(re.findall(r"\bimprint_[a-z_]+[a-z]\b", text))
    stems = {re.sub(r"_(bucket|count|sum)$", "", name) for name in named}
    assert sorted(stems - declared - {"imprint_process"}) == []


@pytest.mark.parametrize("path", PAGES_OF_PEOPLE, ids=ids)
def test_flags_exist(path: Path) -> None:
    """Flags of `imprint` commands, and flags named alone in inline code."""
    text = path.read_text(encoding="utf-8")
    commands = "serve|answer|adapt|documents|adaptations|models|eval|bench|train"
    places = re.findall(rf"imprint (?:{commands})\b[^\n`|]*", text)
    places += re.findall(r"`(--[^`\n]*)`", text)
    named = {flag for place in places for flag in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", place)}
    known = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    settings = {option.flag for option in options()}
    assert [flag for flag in sorted(named - settings) if flag not in known] == []


def raised_codes() -> Iterator[tuple[str, Path]]:
    """Codes that the sources name: `code=...`, `code = ...` in a class, or a call's argument."""
    for path in (p for layer in ("adapters", "server") for p in (ROOT / layer).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[ast.expr] = []
            if isinstance(node, ast.Call):
                found += [word.value for word in node.keywords if word.arg == "code"]
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(
                    function, "id", "")  # fmt: skip
                place = PLACES.get(name)
                if place is not None and len(node.args) > place:
                    found.append(node.args[place])
            elif isinstance(node, ast.Assign):
                named = [target.id for target in node.targets if isinstance(target, ast.Name)]
                found += [node.value] if named == ["code"] else []
            for value in found:
                if isinstance(value, ast.Constant) and CODE.fullmatch(str(value.value)):
                    yield str(value.value), path


def test_every_code_that_is_raised_is_explained() -> None:
    raised = dict(raised_codes())
    assert len(raised) > 20, "the search finds them"
    unknown = {code: ids(path) for code, path in raised.items() if code not in ERROR_CODES}
    assert unknown == {}, "explain them in server/error_codes.py"
    assert sorted(set(STATUS_CODES.values()) - set(ERROR_CODES)) == []


def test_every_code_that_is_explained_is_raised() -> None:
    made = {"adaptation_failed"}  # of a status
    sources = "".join(
        path.read_text(encoding="utf-8")
        for layer in ("adapters", "server")
        for path in (ROOT / layer).rglob("*.py")
        if path.name != "error_codes.py"
    )
    quoted = set(re.findall(r"""["'](\w+)["']""", sources))
    silent = set(ERROR_CODES) - quoted
    assert sorted(silent - made) == []


def test_statuses_are_those_that_are_sent() -> None:
    sent = {code: str(status) for status, code in STATUS_CODES.items()}
    assert {code: ERROR_CODES[code].status for code in sent} == sent
