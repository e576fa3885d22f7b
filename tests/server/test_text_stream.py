"""Stop strings cut where they should, however the text comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imprint.server.text_stream import StopMatcher, TextStream

WORDS = st.text("abc", max_size=12)


def shown(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stop)
    parts = [matcher.push(piece) for piece in pieces]
    stopped = matcher.stopped
    return "".join(parts) + matcher.flush(), stopped


def reference(text: str, stop: list[str]) -> tuple[str, bool]:
    """Letter by letter, look whether a stop string has just been completed."""
    for end in range(1, len(text) + 1):
        complete = [len(string) for string in stop if string and text[:end].endswith(string)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


@given(st.lists(WORDS, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_the_same_text_in_any_pieces(pieces: list[str], stop: list[str]) -> None:
    assert shown(pieces, stop) == reference("".join(pieces), stop)


@given(st.lists(WORDS, max_size=6), st.text("abc", min_size=1, max_size=4))
def test_no_more_is_held_back_than_could_become_a_stop_string(pieces: list[str], stop: str) -> None:
    matcher = StopMatcher([stop])
    came, gone = "", ""
    for piece in pieces:
        came += piece
        gone += matcher.push(piece)
        if not matcher.stopped:
            assert stop.startswith(came[len(gone) :])
            assert len(came) - len(gone) < len(stop)


def test_an_empty_stop_string_stops_nothing() -> None:
    assert shown(["ab", "c"], [""]) == ("abc", False)


class Halves:
    """A decoder whose every second token completes a character."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def step(self, token_id: int) -> str | None:
        self.tokens.append(token_id)
        return None if len(self.tokens) % 2 else chr(token_id)


@pytest.mark.parametrize(("tokens", "text"), [([1, 233], "é"), ([1, 233, 5], "é"), ([1], "")])
def test_incomplete_characters_are_never_shown(tokens: list[int], text: str) -> None:
    stream = TextStream(Halves(), [])
    assert "".join(stream.push(token) for token in tokens) + stream.flush() == text
