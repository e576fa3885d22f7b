"""Writes the pages of docs/reference from the code: settings, metrics, errors, command line.

`python -m imprint.server.reference FOLDER`, or `make docs`. Loads no torch and starts nothing; a
test asks that the pages are what this would write.
"""

import argparse
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from prometheus_client import Histogram

from imprint.server.cli import build_parser
from imprint.server.config import BUNDLED_MODEL, SECRETS, Option, options
from imprint.server.error_codes import ERROR_CODES
from imprint.server.metrics import PREFIX, Metrics

NOTE = "<!-- Written by `make docs` from the code. Do not edit. -->\n"


def settings_page() -> str:
    """Every setting: flag, variable, type, default, meaning."""
    rows = [
        (f"`{o.flag}`", f"`{o.env}`", _type(o.annotation), _default(o), o.description)
        for o in options()
    ]
    return _page(
        "Settings",
        "Flags of `imprint serve`, and variables of its environment. A flag wins over a variable.",
        _table(("flag", "variable", "type", "default", "meaning"), rows),
    )


def metrics_page() -> str:
    """Every metric: type, labels, meaning; and the buckets of histograms."""
    declared = Metrics().families
    rows = [
        (f"`{PREFIX}{name}`", metric._type, _labels(metric), metric._documentation)
        for name, metric in declared.items()
    ]
    buckets = [
        (f"`{PREFIX}{name}`", " ".join(f"{bound:g}" for bound in metric._kwargs["buckets"]))
        for name, metric in declared.items()
        if isinstance(metric, Histogram)
    ]
    return _page(
        "Metrics",
        "Of `GET /metrics`, in the Prometheus format. Beside these there are `imprint_process_*`: "
        "memory, CPU and open files of the API process.",
        _table(("metric", "type", "labels", "meaning"), rows),
        "## Buckets\n",
        _table(("histogram", "upper bounds"), buckets),
    )


def errors_page() -> str:
    """Every code of the error shape."""
    rows = [(f"`{c}`", e.status, e.meaning, e.remedy) for c, e in sorted(ERROR_CODES.items())]
    return _page(
        "Errors",
        "Every answer that is not a success has one shape, that of the OpenAI API: "
        '`{"error": {"message", "type", "param", "code"}}`. `type` is `server_error` for 5xx, '
        "else `invalid_request_error`; `param` is the path of the field that is meant, or null. "
        "Where waiting helps there is `Retry-After`, in seconds, at most 120. Failed adaptations "
        "have the same codes in their `error`.",
        _table(("code", "status", "meaning", "what to do"), rows),
    )


def commands_page() -> str:
    """Every command with its arguments; those of `serve` that are settings are on their page."""
    parts = [
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n",
    ]
    for name, parser in _parsers(build_parser(), "imprint"):
        parts.append(f"## {name}\n")
        if parser.description:
            parts.append(f"{_cell(parser.description)}\n")
        rows = [row for action in parser._actions if (row := _argument(action, name))]
        if rows:
            parts.append(_table(("argument", "meaning"), rows))
        if name == "imprint serve":
            parts.append("Its arguments are the [settings](settings.md).\n")
        if parser.epilog:
            parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return _page("Command line", *parts)


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "errors.md": errors_page,
    "commands.md": commands_page,
}


def _page(title: str, *parts: str) -> str:
    return "\n".join((NOTE + f"# {title}\n", *(part.rstrip("\n") + "\n" for part in parts)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(choice) for choice in get_args(annotation))
    if annotation is type(None):
        return "none"
    name = str(getattr(annotation, "__name__", annotation)).lower()
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        name, name
    )


def _default(option: Option) -> str:
    if option.name in SECRETS or option.default in (None, "", ()):
        return ""
    if option.default == BUNDLED_MODEL:
        return "the bundled model"
    return f"`{option.default}`"


def _labels(metric: Any) -> str:
    return ", ".join(f"`{label}`" for label in metric._labelnames)


def _parsers(
    parser: argparse.ArgumentParser, name: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, child in action.choices.items():
                yield from _parsers(child, f"{name} {command}")


def _argument(action: argparse.Action, command: str) -> tuple[str, str] | None:
    settings = {option.flag for option in options()}
    hidden = isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    if hidden or action.help == argparse.SUPPRESS:
        return None
    if command == "imprint serve" and settings & set(action.option_strings):
        return None
    value = "" if action.nargs == 0 else str(action.metavar or "")
    if not value and action.choices is not None:
        value = "{" + ",".join(str(choice) for choice in action.choices) + "}"
    value = value or ("" if action.nargs == 0 else action.dest.upper())
    spelled = ", ".join(f"{flag} {value}".strip() for flag in action.option_strings) or value
    text = (action.help or "") % {**vars(action), "prog": command}
    text = text.replace(str(BUNDLED_MODEL), "the bundled model")
    return f"`{spelled}`", text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write every page into the folder that is given."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    for name, page in PAGES.items():
        (Path(folder) / name).write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
