"""The page at `/` and its files, read once when the app is made. Holds no documents, asks no key.

Only the files that lie in the package's folder are served, by exact name.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Final

from fastapi import APIRouter, Header, Response
from starlette.exceptions import HTTPException

FOLDER: Final = Path(__file__).resolve().parents[1] / "static"

MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}

# Scripts and styles from this server's files alone, none of them inline; no other host at all; no
# frames; and no way for a script to make markup of a string (trusted types without a policy).
CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Routes of the page, with its files as they are now."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(if_none_match: Annotated[str, Header()] = "") -> Response:
        return _response("index.html", files["index.html"], if_none_match)

    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def static(name: str, if_none_match: Annotated[str, Header()] = "") -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        return _response(name, files[name], if_none_match)

    return router


def _response(name: str, content: bytes, if_none_match: str) -> Response:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}
    if etag in if_none_match:
        return Response(status_code=304, headers=headers)
    media_type = f"{MEDIA_TYPES[Path(name).suffix]}; charset=utf-8"
    return Response(content, media_type=media_type, headers=headers)
