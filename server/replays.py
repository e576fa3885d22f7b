"""`Idempotency-Key`: a request that is sent again gets the reply of the first time.

A route takes part when its router has `route_class=IdempotentRoute` and the route depends on
`IDEMPOTENT`; one whose body is too large to be held calls `Replays.once` itself. Kept are whole
successful replies; streams and refusals are not. The reply is written after the work: where the
server dies between the two, the request is done again.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from imprint.server.errors import ConflictError, InvalidRequestError
from imprint.server.journal_file import JournalUnavailableError
from imprint.server.journal_thread import JournalThread
from imprint.server.replay_journal import KeptReply, get_reply, keep_reply
from imprint.server.streams import ClientDisconnectedError

logger = logging.getLogger(__name__)

_KEY: Final = re.compile(r"[\x20-\x7e]{1,255}")
_BOUNDARY: Final = re.compile(r"boundary=\"?([^\";]+)")


async def _declared(
    idempotency_key: Annotated[
        str | None,
        Header(description="1 to 255 printable ASCII characters; a repetition is answered alike."),
    ] = None,
) -> None:
    """Describes the header; `IdempotentRoute` reads it."""


IDEMPOTENT = Depends(_declared)


class Replays:
    """Replies by key, and which keys are in use now."""

    def __init__(self, journal: JournalThread) -> None:
        self._journal = journal
        self._running: dict[tuple[str, str], str] = {}

    async def once(
        self, owner: str, key: str, sha256: str, work: Callable[[], Coroutine[Any, Any, Response]]
    ) -> Response:
        """The kept reply, or that of `work`, which is kept.

        Raises ConflictError for a key that another request has used, or that is in use.
        """
        running = self._running.get((owner, key))
        if running is not None:
            _check(running, sha256)
            raise ConflictError(
                "the first request with this Idempotency-Key is not answered yet",
                code="idempotency_key_in_use",
                retry_after_s=1.0,
            )
        self._running[owner, key] = sha256
        try:
            kept = await self._journal(get_reply, owner, key)
            if kept is None:
                response = await work()
                await self._keep(owner, key, sha256, response)
                return response
        finally:
            del self._running[owner, key]
        _check(kept.request_sha256, sha256)
        headers = {"Idempotent-Replayed": "true"}
        if kept.location is not None:
            headers["Location"] = kept.location
        return Response(kept.body, kept.status, headers, media_type="application/json")

    async def _keep(self, owner: str, key: str, sha256: str, response: Response) -> None:
        if response.headers.get("content-type") != "application/json":
            return  # a stream
        reply = KeptReply(
            request_sha256=sha256,
            status=response.status_code,
            location=response.headers.get("location"),
            body=bytes(response.body),
        )
        try:
            await self._journal(keep_reply, owner, key, reply)
        except JournalUnavailableError as error:  # the work is done, and its client hears of it
            logger.error("a reply is not kept for its Idempotency-Key: %s", error)


class IdempotentRoute(APIRoute):
    """A route that honours the header where it depends on `IDEMPOTENT`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if IDEMPOTENT not in self.dependencies:
            return handle

        async def handle_once(request: Request) -> Response:
            key = idempotency_key(request)
            if key is None:
                return await handle(request)
            sha256 = await _fingerprint(request)
            replays: Replays = request.app.state.services.replays
            owner: str = request.state.owner
            return await replays.once(owner, key, sha256, lambda: handle(request))

        return handle_once


def idempotency_key(request: Request) -> str | None:
    """The request's key, if it has one. Raises InvalidRequestError for what cannot be one."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        raise InvalidRequestError(
            "Idempotency-Key must be 1 to 255 printable ASCII characters, sent once",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )
    return keys[0]


def fingerprint(request: Request, content: bytes) -> str:
    """Of path, media type and `content`: the same for a request that is sent again."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    head = f"{request.url.path}\n{media_type}\n".encode()
    return hashlib.sha256(head + hashlib.sha256(content).digest()).hexdigest()


async def _fingerprint(request: Request) -> str:
    """Of the whole request; a form's boundary, which clients draw anew each time, left out."""
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    if boundary := _BOUNDARY.search(request.headers.get("content-type", "")):
        body = body.replace(boundary[1].encode("latin-1"), b"")
    return fingerprint(request, body)


def _check(first_sha256: str, sha256: str) -> None:
    if first_sha256 != sha256:
        raise ConflictError(
            "this Idempotency-Key was sent with another request; take a new one",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
