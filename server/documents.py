"""Stored documents: made, found, read back as text and as tokens. Knows no jobs and no HTTP.

A document's tokens are those of its parts, one list after the other: what is appended is tokenized
on its own, so that the tokens before it stay what they were when they were studied.
"""

import asyncio
import secrets
from dataclasses import replace
from typing import Any

from imprint.models.tokenizer import Tokenizer
from imprint.server import document_journal
from imprint.server.config import Settings
from imprint.server.document_records import DocumentRow, NewDocument, SourceText
from imprint.server.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    TooLargeError,
    clip,
)
from imprint.server.journal import DocumentGoneError
from imprint.server.journal_thread import JournalThread
from imprint.server.limits import Limits
from imprint.server.schemas import UploadFields


def encode_parts(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """Tokens of a document that consists of these parts."""
    tokens: list[int] = []
    for part in parts:
        tokens += tokenizer.encode(part, continues=bool(tokens))
    return tokens


class Documents:
    """The documents of this server."""

    def __init__(
        self, settings: Settings, journal: JournalThread, tokenizer: Tokenizer, limits: Limits
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._tokenizer = tokenizer
        self._limits = limits

    async def create(
        self, owner: str, source: SourceText, fields: UploadFields, *, param: str
    ) -> DocumentRow:
        """Store a document; raises TooLargeError, and InvalidRequestError for an empty one."""
        tokens = await self.encode([source.text], param=param)
        self._limits.admit_tokens(owner, len(tokens))
        new = NewDocument(
            id=f"doc_{secrets.token_hex(12)}",
            owner=owner,
            source=source if fields.title is None else replace(source, title=fields.title),
            num_tokens=len(tokens),
            metadata=fields.metadata,
            expires_after_s=fields.expires_after_s,
        )
        return await self._journal(document_journal.create_document, new)

    async def append(self, row: DocumentRow, text: str, *, version: int | None) -> DocumentRow:
        """Make the document's next version; raises ConflictError where `version`, or the one that
        was looked at, is not the newest any more."""
        limit_left = self._settings.max_document_tokens - row.num_tokens
        tokens = await asyncio.to_thread(self._tokenizer.encode, text, continues=True)
        if not 0 < len(tokens) <= limit_left:
            self.check_length(row.num_tokens + len(tokens) if tokens else 0, param="text")
        try:
            if version not in (None, row.version):
                raise DocumentGoneError(row.id)
            append = document_journal.append_text
            return await self._journal(append, row, text, len(tokens))
        except DocumentGoneError:
            raise ConflictError(
                f"{row.id} has another version by now; look at it and append again",
                code="version_conflict",
                param="version",
            ) from None

    async def get(self, id: str, owner: str, *, param: str | None = None) -> DocumentRow:
        """The document; raises NotFoundError for an unknown one, another owner's or a deleted."""
        row = await self._journal(document_journal.get_document, id)
        if row is None or row.deleting or row.owner != owner:
            raise document_not_found(id, param=param)
        return row

    async def page(self, owner: str, *, after: str | None, limit: int) -> list[DocumentRow]:
        """Newest first, from behind `after`."""
        if after is not None:
            await self.get(after, owner, param="after")
        return await self._journal(document_journal.document_page, owner, after=after, limit=limit)

    async def content(self, row: DocumentRow) -> tuple[str, list[dict[str, Any]]]:
        """The text, and the places of its source."""
        parts, references = await self._journal(document_journal.document_content, row)
        return "".join(parts), references

    async def adaptation(self, row: DocumentRow) -> str | None:
        """The newest adaptation of this version that can be asked; None where there is none."""
        return await self._journal(document_journal.ready_adaptation, row)

    async def tokens(self, row: DocumentRow) -> list[int]:
        """The document's tokens."""
        parts, _ = await self._journal(document_journal.document_content, row)
        if not parts:
            raise document_not_found(row.id)
        return await self.encode(parts, param="document_id")

    async def encode(self, parts: list[str], *, param: str) -> list[int]:
        """Tokens of a document of these parts, checked against the server's limit."""
        # A megabyte takes a while to encode; the event loop goes on in the meantime.
        tokens = await asyncio.to_thread(encode_parts, self._tokenizer, parts)
        self.check_length(len(tokens), param=param)
        return tokens

    def check_length(self, num_tokens: int, *, param: str) -> None:
        """Raises TooLargeError, and InvalidRequestError for no tokens at all."""
        limit = self._settings.max_document_tokens
        if num_tokens > limit:
            raise TooLargeError(
                f"the document has {num_tokens} tokens; at most {limit} are allowed",
                code="document_too_large",
                param=param,
            )
        if num_tokens == 0:
            raise InvalidRequestError(
                "the document holds no text", code="document_empty", param=param
            )


def document_not_found(id: str, *, param: str | None = None) -> NotFoundError:
    """The one error for unknown, foreign and deleted documents."""
    return NotFoundError(f"no document {clip(id)!r}", code="document_not_found", param=param)
