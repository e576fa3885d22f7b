"""One exception tree and one error shape, the OpenAI one, for every status. Knows no routes.

`{"error": {"message", "type", "param", "code"}}`. What a user sent is cut to 200 characters before
it is shown again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from imprint.server.error_codes import ERROR_CODES

MAX_VALIDATION_ERRORS = 10
MAX_INPUT_CHARS = 200
MAX_RETRY_AFTER_S = 120

STATUS_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    410: "gone",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}


class ImprintError(Exception):
    """Base of what the server tells a client: its message is meant to be shown."""

    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.status = status or self.status
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return error_body(self.status, self.message, code=self.code, param=self.param)

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, 1 to 120, where waiting helps."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(min(MAX_RETRY_AFTER_S, max(1, round(self.retry_after_s))))}


class InvalidRequestError(ImprintError):
    """The request cannot be served as it is written."""

    status = 400
    code = "invalid_request"


class UnauthorizedError(ImprintError):
    """The request carries no key, or one that is not known."""

    status = 401
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        """Names the scheme that is asked for."""
        return {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ImprintError):
    """The request comes from where it may not come from."""

    status = 403
    code = "forbidden"


class RateLimitedError(ImprintError):
    """The owner asks for more than its share."""

    status = 429
    code = "rate_limit_exceeded"


class NotFoundError(ImprintError):
    """No such resource, or not this client's."""

    status = 404
    code = "not_found"


class ConflictError(ImprintError):
    """The resource is in a state that does not allow this."""

    status = 409
    code = "conflict"


class GoneError(ImprintError):
    """The resource existed and cannot be used any more."""

    status = 410
    code = "gone"


class TooLargeError(ImprintError):
    """Body or document over its limit."""

    status = 413
    code = "body_too_large"


class OverloadedError(ImprintError):
    """The server takes no more work now: `queue_full`, `draining`, `worker_died`."""

    status = 503
    code = "queue_full"

    def __init__(
        self, message: str, *, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s)


class WorkFailedError(ImprintError):
    """A worker gave up on a job or a request, with its own code."""

    def __init__(self, code: str, message: str) -> None:
        known = ERROR_CODES.get(code)
        # those of an adaptation alone have no status: no client ought to hear them
        status = int(known.status) if known is not None and known.status.isdigit() else 500
        super().__init__(
            message, code=code, status=status, retry_after_s=1.0 if status == 503 else None
        )


class DeadlineError(WorkFailedError):
    """A request's time is over; `phase` is where that caught it: queue, quantum or decode."""

    def __init__(self, message: str, phase: str) -> None:
        super().__init__("deadline_exceeded", message)
        self.phase = phase


NOT_JSON = "the body is not JSON in UTF-8, is nested too deep, or holds a number of too many digits"


def error_body(status: int, message: str, *, code: str, param: str | None = None) -> dict[str, Any]:
    """The one shape. `type` follows the status as in the OpenAI API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def clip(value: object) -> str:
    """`value` as text that is short and always encodable (a body may hold lone surrogates)."""
    text = value if isinstance(value, str) else repr(value)
    text = text[: MAX_INPUT_CHARS + 1].encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_INPUT_CHARS else text[: MAX_INPUT_CHARS - 1] + "…"


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ImprintError:
    """One 400 for pydantic's list of errors; `param` is the path of the first field."""
    lines = [_line(error) for error in errors[:MAX_VALIDATION_ERRORS]]
    if len(errors) > MAX_VALIDATION_ERRORS:
        lines.append(f"and {len(errors) - MAX_VALIDATION_ERRORS} more")
    first = errors[0] if errors else {}
    code = {
        "extra_forbidden": "unknown_parameter",
        "missing": "missing_parameter",
        "json_invalid": "invalid_json",
    }.get(str(first.get("type")), "invalid_request")
    return InvalidRequestError("; ".join(lines), code=code, param=_path(first) or None)


def _path(error: Mapping[str, Any]) -> str:
    place = error.get("loc", ())
    names = place[1:] if place and place[0] in ("body", "query", "path", "header") else place
    return clip(".".join(str(name) for name in names))


def _line(error: Mapping[str, Any]) -> str:
    path, message = (
        _path(error),
        clip(str(error.get("msg", "invalid")).removeprefix("Value error, ")),
    )
    if error.get("type") == "extra_forbidden":
        return f"{path}: unknown parameter"
    if error.get("type") == "json_invalid":
        return f"the body is not valid JSON: {clip(error.get('ctx', {}).get('error', message))}"
    if not path and error.get("type") in ("model_type", "model_attributes_type"):
        message = "the body must be a JSON object"
    shown = "" if error.get("type") == "missing" else f" (got {clip(error.get('input'))})"
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"
