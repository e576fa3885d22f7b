"""Help that teaches: every command says what it does and shows how, and can speak JSON."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from imprint.server.cli import build_parser
from imprint.server.commands.descriptions import HelpFormat

Place = tuple[str, ...]

WITHOUT_JSON = {
    # what it says is its log: `--log-format json`
    ("serve",),
    # what it prints is a script
    ("completion",),
}


def places(parser: argparse.ArgumentParser, place: Place = ()) -> Iterator[Place]:
    """Every command and every action, by its words."""
    yield place
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from places(child, (*place, name))


def parser_at(place: Place) -> argparse.ArgumentParser:
    parser = build_parser()
    for word in place:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = action.choices[word]
    return parser


ALL = list(places(build_parser()))
LEAVES = [place for place in ALL if not any(p[: len(place)] == place != p for p in ALL)]


def flags(place: Place) -> set[str]:
    return {flag for action in parser_at(place)._actions for flag in action.option_strings}


def examples(place: Place) -> list[str]:
    """The lines below `examples:` up to the first empty one, without what explains them."""
    _, found, rest = (parser_at(place).epilog or "").partition("examples:\n")
    assert found, f"{place} shows no example"
    return [line.strip().split("   ")[0] for line in rest.split("\n\n")[0].splitlines()]


def test_the_walk_finds_commands_and_actions() -> None:
    assert {("serve",), ("documents", "add"), ("models", "list"), ("train", "post")} <= set(LEAVES)
    assert ("documents",) not in LEAVES


@pytest.mark.parametrize("place", ALL, ids=" ".join)
def test_help_says_what_it_does_and_shows_how(place: Place) -> None:
    assert len(parser_at(place).description or "") > 10
    lines = examples(place)
    assert any(line.startswith(" ".join(("imprint", *place))) for line in lines)
    for line in lines:
        words = shlex.split(line.partition(" > ")[0])
        assert words[0] == "imprint", line
        build_parser().parse_args(words[1:])
    told = " ".join(parser_at(place).format_help().split())
    assert all(" ".join(line.split()) in told for line in lines)


@pytest.mark.parametrize("place", ALL, ids=" ".join)
def test_every_argument_is_explained(place: Place) -> None:
    for action in parser_at(place)._actions:
        if not isinstance(action, argparse._SubParsersAction) and action.dest not in ("id", "file"):
            assert action.help or action.choices or action.metavar, (place, action.dest)


@pytest.mark.parametrize("place", LEAVES, ids=" ".join)
def test_every_command_speaks_json(place: Place) -> None:
    assert ("--json" in flags(place)) != (place in WITHOUT_JSON)


def test_the_logs_of_a_server_are_json_where_asked() -> None:
    assert "--log-format" in flags(("serve",))


@pytest.mark.parametrize("width", [40, 200])
def test_sentences_are_wrapped_and_examples_are_not(width: int) -> None:
    parser = parser_at(("eval", "ruler"))
    text = HelpFormat("imprint", width=width)
    text.add_text(parser.description)
    assert max(map(len, text.format_help().splitlines())) <= width
    text = HelpFormat("imprint", width=width)
    text.add_text(parser.epilog)
    assert [line.strip() for line in text.format_help().splitlines()][1:] == examples(
        ("eval", "ruler")
    )
