"""What can go wrong between client and server, and how a refused response is read.

Knows the server's one error shape; sends nothing.
"""

from __future__ import annotations

import json
import math
from typing import Any

import httpx

_MAX_RETRY_AFTER_S = 120.0


class ClientError(Exception):
    """Base of what can go wrong between client and server; the message is for people."""


class ServerUnreachableError(ClientError):
    """Nothing answers at the address, or the connection broke."""


class BadReplyError(ClientError):
    """The server said something this client does not understand."""


class ApiError(ClientError):
    """The server refused or failed, in its own words."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None,
        retry_after_s: float | None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; 200 for an error in mid-stream."""
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; raises `BadReplyError` for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadReplyError("the server's reply is not JSON; is it an Imprint server?") from error
    if not isinstance(value, dict):
        raise BadReplyError("the server's reply is not a JSON object; is it an Imprint server?")
    return value


def failure(response: httpx.Response) -> ApiError:
    """The error that an unsuccessful response, already read, stands for."""
    try:
        record = parse_object(response.content)
    except BadReplyError:
        record = {}
    if not isinstance(record.get("error"), dict):
        reason = f"HTTP {response.status_code} {response.reason_phrase}".strip()
        record = {"error": {"message": f"the server replied {reason}", "code": "http_error"}}
    return api_error(
        record,
        status=response.status_code,
        retry_after_s=_retry_after_s(response.headers.get("Retry-After")),
    )


def api_error(
    record: dict[str, Any], *, status: int, retry_after_s: float | None = None
) -> ApiError:
    """The exception for a body of the one error shape."""
    error = record["error"] if isinstance(record["error"], dict) else {}
    return ApiError(
        str(error.get("message", "unknown error")),
        status=status,
        code=str(error.get("code", "unknown")),
        param=error.get("param"),
        retry_after_s=retry_after_s,
    )


def _retry_after_s(header: str | None) -> float | None:
    """Seconds of a `Retry-After` header, at most 120; dates and nonsense count as no header."""
    try:
        seconds = float(header) if header is not None else None
    except ValueError:
        return None
    if seconds is None or math.isnan(seconds):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)
