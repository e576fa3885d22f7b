"""`/v1/documents`: create, get, list, content, delete."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from imprint.server.auth import Owner
from imprint.server.replies import document_object, list_object
from imprint.server.routes.bodies import JSON_BODY
from imprint.server.schemas import CreateDocument
from imprint.server.services import FromApp

router = APIRouter(prefix="/v1/documents")

Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("", status_code=201, dependencies=JSON_BODY)
async def create(body: CreateDocument, owner: Owner, services: FromApp) -> JSONResponse:
    """Store a document, to be studied and asked by its id."""
    services.jobs.refuse_when_draining()
    row = await services.documents.create(
        owner,
        body.text,
        title=body.title,
        metadata=body.metadata,
        expires_after_s=body.expires_after_s,
    )
    location = {"Location": f"/v1/documents/{row.id}"}
    return JSONResponse(document_object(row), status_code=201, headers=location)


@router.get("")
async def page(
    owner: Owner, services: FromApp, limit: Limit = 20, after: str | None = None
) -> dict[str, Any]:
    """Documents, newest first; `after` is the last id of the page before."""
    rows = await services.documents.page(owner, after=after, limit=limit + 1)
    data = [document_object(row) for row in rows[:limit]]
    return list_object(data, has_more=len(rows) > limit)


@router.get("/{id}")
async def get(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """One document, without its text."""
    return document_object(await services.documents.get(id, owner))


@router.get("/{id}/content")
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


@router.delete("/{id}")
async def delete(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """Delete it with its adaptations: answers when no memory and no file holds them any more."""
    await services.retention.delete_document(id, owner)
    return {"id": id, "object": "document", "deleted": True}
