"""What the client's methods take and give. Sends nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Generic, Self, TypeVar

from imprint.server.client_errors import BadReplyError

Item = TypeVar("Item")
TERMINAL_STATUSES = frozenset({"succeeded", "rejected", "failed", "cancelled", "expired"})
"""Statuses after which an adaptation changes no more."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """One adaptation job as the server describes it."""

    id: str
    status: str
    body: dict[str, Any]
    """The whole JSON object."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the server's object; raises `BadReplyError` for another one."""
        _check(body, "an adaptation", id=str, status=str)
        return cls(body["id"], body["status"], body)

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in TERMINAL_STATUSES


@dataclass(frozen=True, slots=True)
class Document:
    """One stored document, without its text."""

    id: str
    num_tokens: int
    body: dict[str, Any]
    """The whole JSON object."""

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the server's object; raises `BadReplyError` for another one."""
        _check(body, "a document", id=str, num_tokens=int)
        return cls(body["id"], body["num_tokens"], body)


@dataclass(frozen=True, slots=True)
class AppendedDocument:
    """A document that has been added to, and the job that reads or studies what is new."""

    document: Document
    adaptation: Adaptation

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the server's object; raises `BadReplyError` for another one."""
        _check(body, "an appended document", adaptation=dict)
        return cls(Document.from_body(body), Adaptation.from_body(body["adaptation"]))


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """A part of a list; the next one comes after the last item's id."""

    items: list[Item]
    has_more: bool
    last_id: str | None


@dataclass(frozen=True, slots=True)
class AdaptationEvent:
    """Something that happened to an adaptation; `data` holds its numbers."""

    id: str | None
    kind: str
    data: dict[str, Any]

    @classmethod
    def from_body(cls, event_id: str | None, body: dict[str, Any]) -> Self:
        """Read the server's object; what is missing is empty."""
        data = body.get("data")
        kind = str(body.get("kind", ""))
        return cls(event_id, kind, data if isinstance(data, dict) else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRequest:
    """Questions about one document, given as text, by its id or by an adaptation's; None means
    default."""

    questions: tuple[str, ...]
    document: str | None = None
    document_id: str | None = None
    """Id of a stored document, instead of a text."""
    adaptation: str | None = None
    """Id of an adaptation, instead of a document."""
    focus: bool | dict[str, Any] | None = None
    """Whether to adapt for the questions; an object overrides fields of that adaptation."""
    method: dict[str, Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    """Strings that end an answer."""
    seed: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        sources = (self.document, self.document_id, self.adaptation)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give either a document or the id of a document or an adaptation")

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return present(**asdict(self))


def _check(body: dict[str, Any], what: str, **fields: type) -> None:
    if not all(isinstance(body.get(name), kind) for name, kind in fields.items()):
        raise BadReplyError(f"the server's reply is not {what}; is it an Imprint server?")


def present(**values: Any) -> dict[str, Any]:
    """What is not None."""
    return {name: value for name, value in values.items() if value is not None}
