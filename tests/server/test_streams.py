"""Server-sent events as bytes."""

import json

import pytest

from imprint.server.streams import encode_event


@pytest.mark.parametrize("text", ["\n", "\r\n", "\x0b\x0c", "\x1c\x1d\x1e", "\x85", "\u2028\u2029"])
def test_an_event_is_one_line_for_every_splitter_of_lines(text: str) -> None:
    event = encode_event({"text": f"a{text}b", "kept": "é漢"}, id=3).decode()
    assert event.splitlines()[0] == "id: 3"
    line = event.splitlines()[1]
    assert event == f"id: 3\n{line}\n\n"
    assert json.loads(line.removeprefix("data: ")) == {"text": f"a{text}b", "kept": "é漢"}
    assert "é漢" in line
