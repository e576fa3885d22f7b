"""What the handlers share: the check of a body's media type. Knows headers only.

Here as everywhere, what handlers depend on is `async`: FastAPI would send a plain function through
a pool of threads, and a request would wait there four times for the GIL.
"""

from fastapi import Depends, Request
from starlette.exceptions import HTTPException


async def require_json(request: Request) -> None:
    """Refuse a body that is not declared as JSON: otherwise a browser's form could post one."""
    _require(request, "application/json", "JSON")


async def require_file(request: Request) -> None:
    """The same for a body that is a file."""
    _require(request, "application/octet-stream", "the file")


def _require(request: Request, wanted: str, what: str) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != wanted:
        raise HTTPException(
            415, f"send {what} with Content-Type: {wanted}, not {media_type[:100]!r}"
        )


JSON_BODY = [Depends(require_json)]
FILE_BODY = [Depends(require_file)]
