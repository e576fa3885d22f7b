"""What the handlers share: the check of a body's media type. Knows headers only."""

from fastapi import Depends, Request
from starlette.exceptions import HTTPException


def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON: otherwise a browser's form could post one."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(
            415, f"send JSON with Content-Type: application/json, not {media_type[:100]!r}"
        )


JSON_BODY = [Depends(require_json)]
