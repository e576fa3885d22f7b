"""The two bodies of `POST /v1/documents`: JSON, or a form with a file. Knows headers and forms."""

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from imprint.server.api_examples import EXAMPLES
from imprint.server.errors import NOT_JSON, InvalidRequestError
from imprint.server.schemas import CreateDocument, UploadFields

Checked = TypeVar("Checked", bound=UploadFields)
MAX_FIELD_BYTES = 64 * 1024
DOCUMENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": CreateDocument.model_json_schema(),
                "example": EXAMPLES["CreateDocument"],
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "txt, md, html, pdf or docx",
                        },
                        **UploadFields.model_json_schema()["properties"],
                    },
                }
            },
        },
    }
}
"""What the two look like in the OpenAPI document."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file, and the fields beside it."""

    data: bytes
    name: str
    media_type: str
    fields: UploadFields


async def document_body(request: Request) -> CreateDocument | Upload:
    """The body, checked. Raises RequestValidationError and HTTPException as FastAPI does."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        return _validated(CreateDocument, await _json(request))
    if media_type == "multipart/form-data":
        return await _upload(request)
    raise HTTPException(
        415, f"send application/json or multipart/form-data, not {media_type[:100]!r}"
    )


async def _json(request: Request) -> Any:
    body = await request.body()
    if not body:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "no body"}])
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}]
        ) from None
    except (ValueError, RecursionError):
        raise InvalidRequestError(NOT_JSON, code="invalid_json") from None


async def _upload(request: Request) -> Upload:
    async with request.form(max_files=1, max_fields=8, max_part_size=MAX_FIELD_BYTES) as form:
        values: dict[str, Any] = {}
        file: UploadFile | None = None
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name == "file":
                file = value
            elif name in values or not isinstance(value, str):
                raise InvalidRequestError(
                    f"send one file, as file, and each other field once; got {name[:100]!r}",
                    param=name[:100],
                )
            else:
                values[name] = value
        if file is None:
            raise InvalidRequestError("no file", code="missing_parameter", param="file")
        fields = _validated(UploadFields, _parsed(values))
        return Upload(await file.read(), file.filename or "", file.content_type or "", fields)


def _parsed(values: dict[str, Any]) -> dict[str, Any]:
    """Form fields are strings; those that stand for something else are JSON."""
    parsed = dict(values)
    for name in ("metadata", "expires_after_s"):
        if name in parsed:
            try:
                parsed[name] = json.loads(parsed[name])
            except (ValueError, RecursionError):
                raise InvalidRequestError(f"{name} must be JSON", param=name) from None
    return parsed


def _validated(kind: type[Checked], value: Any) -> Checked:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        details = [{**found, "loc": ("body", *found["loc"])} for found in error.errors()]
        raise RequestValidationError(details) from None
