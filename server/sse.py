"""Reading server-sent events from lines of text. Knows no HTTP and no meaning of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: its data (lines joined by newlines) and the last id seen so far."""

    data: str
    id: str | None


@dataclass(slots=True)
class EventReader:
    """Takes lines one by one, by the WHATWG rules; passes over what is of no use here."""

    data: list[str] = field(default_factory=list)
    event_id: str | None = None

    def take(self, line: str) -> ServerSentEvent | None:
        """The event that this line, which comes without its end, completes."""
        if not line:
            data, self.data = self.data, []
            return ServerSentEvent("\n".join(data), self.event_id) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self.data.append(value)
        elif name == "id" and "\0" not in value:
            self.event_id = value
        return None


def parse_events(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    """Events of a stream. One that the stream's end cuts off is dropped."""
    reader = EventReader()
    for line in lines:
        if (event := reader.take(line)) is not None:
            yield event
