"""What a route's decorator says of its answers, for the OpenAPI document. Changes no behaviour."""

from typing import Any

from pydantic import BaseModel

from imprint.server.reply_schemas import ErrorReply

REASONS = {
    400: "The request cannot be served as it is written; `param` names the field.",
    401: "No key, or one that is not known.",
    403: "Without keys: a page of another origin, or a foreign host name.",
    404: "No such resource, or another owner's.",
    408: "The request arrived too slowly.",
    409: "The resource is in a state that does not allow this; `Retry-After` where waiting helps.",
    410: "The resource existed and cannot be used any more.",
    413: "The body or the document is too large.",
    415: "The body is of a type that is not read here, or compressed.",
    429: "Over the limit of requests or tokens a minute, or of one's share of a queue; see "
    "`Retry-After`.",
    431: "The head of the request is too long.",
    500: "The server failed on this request.",
    503: "Overloaded, stopping or not ready; see `Retry-After`.",
    504: "The deadline passed first.",
}
"""What each status of an error means."""


def described(
    reply: type[BaseModel],
    *errors: int,
    status: int = 200,
    also: int | None = None,
    stream: str | None = None,
) -> dict[str, Any]:
    """Arguments of a route's decorator.

    `reply` is the shape of its answer, `errors` are its own statuses beside those of every route,
    `also` is a second status of success, and `stream` says what the events of `text/event-stream`
    are, where there are some.
    """
    content: dict[str, Any] = {}
    if stream is not None:
        content["text/event-stream"] = {"schema": {"type": "string", "description": stream}}
    success: dict[str, Any] = {"model": reply}
    if content:
        success["content"] = content
    responses: dict[int | str, Any] = {status: success}
    if also is not None:
        responses[also] = success
    return {
        "status_code": status,
        "response_model": None,
        "responses": {**responses, **error_responses(*errors)},
    }


def described_file(media_type: str, *errors: int) -> dict[str, Any]:
    """The same for a route whose answer is a file."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    file: dict[int | str, Any] = {200: {"description": "The file.", "content": content}}
    return {"response_model": None, "responses": {**file, **error_responses(*errors)}}


def error_responses(*statuses: int) -> dict[int | str, Any]:
    """The one shape under each status."""
    return {
        status: {"model": ErrorReply, "description": REASONS[status]} for status in sorted(statuses)
    }
