"""`/v1/documents`: create, get, list, content, delete."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.document_records import SourceText
from imprint.server.replays import IDEMPOTENT, IdempotentRoute
from imprint.server.replies import adaptation_object, document_object, list_object
from imprint.server.reply_schemas import (
    AppendedDocument,
    Deleted,
    Document,
    DocumentContent,
    Page,
)
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.routes.described import described
from imprint.server.routes.uploads import DOCUMENT_BODY, Upload, document_body
from imprint.server.schemas import AppendText, CreateAdaptation
from imprint.server.services import FromApp
from imprint.server.streams import until_disconnect

router = APIRouter(prefix="/v1/documents", route_class=IdempotentRoute)

Limit = Annotated[int, Query(ge=1, le=100)]


@router.post(
    "",
    openapi_extra=DOCUMENT_BODY,
    dependencies=[IDEMPOTENT],
    **described(Document, 409, status=201),
)
async def create(request: Request, owner: Owner, services: FromApp) -> JSONResponse:
    """Store a text, or the text of a file, to be studied and asked by its id."""
    services.jobs.refuse_when_draining()
    body = await document_body(request)
    if isinstance(body, Upload):
        read = services.extraction.read(body.data, name=body.name, media_type=body.media_type)
        source = await until_disconnect(request, read)
        row = await services.documents.create(owner, source, body.fields, param="file")
    else:
        source = SourceText(text=body.text)
        row = await services.documents.create(owner, source, body, param="text")
    location = {"Location": f"/v1/documents/{row.id}"}
    return JSONResponse(document_object(row), status_code=201, headers=location)


@router.get("", **described(Page[Document], 404))
async def page(
    owner: Owner, services: FromApp, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """Documents, newest first; `after` is the last id of the page before."""
    rows = await services.documents.page(owner, after=after, limit=limit + 1)
    data = [document_object(row) for row in rows[:limit]]
    return list_object(data, has_more=len(rows) > limit)


@router.get("/{id}", **described(Document, 404))
async def get(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """One document, without its text."""
    return document_object(await services.documents.get(id, owner))


@router.get("/{id}/content", **described(DocumentContent, 404))
async def content(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """Its text, and where the pages or sections of its source lie in it."""
    row = await services.documents.get(id, owner)
    text, references = await services.documents.content(row)
    return {
        "object": "document.content",
        "id": row.id,
        "version": row.version,
        "text": text,
        "references": references,
    }


@router.post(
    "/{id}/append",
    dependencies=[*JSON_BODY, IDEMPOTENT],
    **described(AppendedDocument, 404, 409, status=202),
)
async def append(id: str, body: AppendText, owner: Owner, services: FromApp) -> dict[str, Any]:
    """Make the document's next version, and read what is new from where the last one ended.

    Adaptations of the older version stay what they are.
    """
    services.jobs.refuse_when_draining()
    row = await services.documents.get(id, owner)
    asked = CreateAdaptation(
        document_id=id, method=body.method or {"type": "read"}, seed=body.seed if body.method else 0
    )
    services.intake.check_append(asked, owner)
    row = await services.documents.append(row, body.text, version=body.version)
    new, tokens = await services.intake.adaptation(asked, owner)
    job, _ = await services.jobs.create(new, tokens)
    return {**document_object(row), "adaptation": adaptation_object(job)}


@router.delete("/{id}", **described(Deleted, 404))
async def delete(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """Delete it with its adaptations: answers when no memory and no file holds them any more."""
    await services.retention.delete_document(id, owner)
    return {"id": id, "object": "document", "deleted": True}
