"""The OpenAPI document: what FastAPI reads from the routes, made complete. Changes no behaviour.

Added are the answers that stand in front of every route (keys, limits, sizes, times), the security
scheme, and an example of every body and reply.
"""

from collections.abc import Iterator
from typing import Any

from imprint.server.api_examples import EXAMPLES, PARAMETERS, STREAMS
from imprint.server.auth import OPEN_FOLDERS, OPEN_PATHS
from imprint.server.errors import MAX_RETRY_AFTER_S, STATUS_CODES, error_body
from imprint.server.routes.described import REASONS

SCHEME = "ApiKey"
EVERYWHERE = (400, 403, 408, 413, 415, 431, 500, 503)
"""What may be answered before a route is reached, or instead of it."""
WITH_KEYS = (401, 429)
"""The same, of paths that need a key."""
_METHODS = frozenset({"get", "post", "put", "patch", "delete"})
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")
"""Shapes of errors that FastAPI would answer with; here every error has one shape."""


def complete(document: dict[str, Any], *, keyed: bool) -> dict[str, Any]:
    """The document with everything that holds for all routes; `keyed`: keys are asked for."""
    schemas = document["components"]["schemas"]
    for name in _FASTAPIS_OWN:
        schemas.pop(name, None)
    for name, example in EXAMPLES.items():
        if name in schemas:
            schemas[name]["examples"] = [example]
    document["components"]["securitySchemes"] = {
        SCHEME: {"type": "http", "scheme": "bearer", "description": "A key of this server."}
    }
    document["components"]["responses"] = {f"Error{status}": _error(status) for status in REASONS}
    for path, operation in operations(document):
        _complete(path, operation, keyed=keyed)
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each path with each operation on it."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in _METHODS:
                yield path, operation


def is_open(path: str) -> bool:
    """Whether the path needs no key, by default."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _complete(path: str, operation: dict[str, Any], *, keyed: bool) -> None:
    operation["tags"] = [path.strip("/").removeprefix("v1/").partition("/")[0] or "page"]
    responses = operation["responses"]
    responses.pop("422", None)
    for response in responses.values():
        if "text/event-stream" in response.get("content", {}):
            response["content"]["text/event-stream"]["example"] = STREAMS[path]
    errors = {int(status) for status in responses if int(status) >= 400}
    errors.update(EVERYWHERE if is_open(path) else (*EVERYWHERE, *WITH_KEYS))
    for status in errors:
        responses[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    operation["responses"] = dict(sorted(responses.items()))
    if not is_open(path):
        operation["security"] = [{SCHEME: []}] if keyed else [{SCHEME: []}, {}]
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path":
            parameter["example"] = _parameter(path, parameter["name"])


def _parameter(path: str, name: str) -> str:
    prefix = path.partition("{")[0]
    return PARAMETERS[prefix + "{" + name]


def _error(status: int) -> dict[str, Any]:
    reason = REASONS[status]
    schema = {"$ref": "#/components/schemas/ErrorReply"}
    example = error_body(status, reason.partition(";")[0], code=STATUS_CODES[status])
    content = {"application/json": {"schema": schema, "example": example}}
    response = {"description": reason, "content": content}
    if status in (429, 503):
        wait = {"type": "integer", "minimum": 1, "maximum": MAX_RETRY_AFTER_S}
        about = "Seconds to wait before the request is sent again."
        response["headers"] = {"Retry-After": {"description": about, "schema": wait}}
    return response
