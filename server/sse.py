"""Reading server-sent events from lines of text. Knows no HTTP and no meaning of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: its data (lines joined by newlines) and the last id seen so far."""

    data: str
    id: str | None


def parse_events(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """Events of a stream, by the WHATWG rules; comments and fields of no use here are passed over.

    `lines` come without their ends. An event that the stream's end cuts off is dropped.
    """
    data: list[str] = []
    event_id: str | None = None
    for line in lines:
        if not line:
            if data:
                yield ServerSentEvent("\n".join(data), event_id)
            data = []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "id" and "\0" not in value:
            event_id = value
