"""`/v1/adaptations/{id}/adapter` and `/v1/adapters`: adapters as files."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from imprint.server.auth import Owner
from imprint.server.errors import GoneError, OverloadedError
from imprint.server.intake import new_id
from imprint.server.records import NewAdaptation
from imprint.server.replays import IDEMPOTENT, fingerprint, idempotency_key
from imprint.server.replies import adaptation_object
from imprint.server.reply_schemas import Adaptation
from imprint.server.routes.bodies import FILE_BODY
from imprint.server.routes.described import described, described_file
from imprint.server.services import FromApp, Services

router = APIRouter()

ADAPTER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
"""What the file looks like in the OpenAPI document."""


@router.get(
    "/v1/adaptations/{id}/adapter",
    response_class=StreamingResponse,
    **described_file("application/octet-stream", 404, 409, 410),
)
async def download(id: str, owner: Owner, services: FromApp) -> StreamingResponse:
    """The adapter as one safetensors file: delta, document-end state, tokens of the document,
    entropies; its metadata holds a manifest and a checksum over both."""
    row = await services.intake.ready(id, owner)
    try:
        num_bytes, pieces = await services.adapter_files.open(row.id)
    except KeyError:
        await services.retention.expire(row.id, "adapter_evicted")
        raise GoneError(f"the adapter of {row.id} is gone", code="adapter_evicted") from None
    headers = {
        "Content-Length": str(num_bytes),
        "Content-Disposition": f'attachment; filename="{row.id}.safetensors"',
    }
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


@router.post(
    "/v1/adapters",
    dependencies=[*FILE_BODY, IDEMPOTENT],
    openapi_extra=ADAPTER_BODY,
    **described(Adaptation, 409, status=202, also=200),
)
async def upload(request: Request, owner: Owner, services: FromApp) -> Response:
    """Take in an adapter that was downloaded, of the same model: 202 and an adaptation with the
    method `import`, or 200 and the one that this file has made already.

    The file is checked before the answer; a worker then checks its tensors against the model.
    """
    key = idempotency_key(request)
    services.jobs.refuse_when_draining()
    services.jobs.refuse_without_room(owner)
    info = services.pool.info
    if info is None:
        raise OverloadedError("no worker is ready yet", code="not_ready")
    id = new_id()
    adapter, num_bytes = await services.adapter_files.take_in(
        id, request.stream(), model_hash=info.model_hash
    )
    new = services.intake.imported(id, owner, adapter, num_bytes)
    if key is None:
        return await _create(services, new)
    # the checksum is over all that counts in the file, which was never held as a whole
    sha256 = fingerprint(request, adapter.checksum.encode())
    begun = False

    async def create() -> Response:
        nonlocal begun
        begun = True  # from now on the file is the job's
        return await _create(services, new)

    try:
        return await services.replays.once(owner, key, sha256, create)
    finally:
        if not begun:
            await services.adapter_files.discard(id)


async def _create(services: Services, new: NewAdaptation) -> Response:
    row, is_new = await services.jobs.create_import(new)
    found = adaptation_object(row, services.jobs.active(row.id), services.jobs.finish_s(row.id))
    location = {"Location": f"/v1/adaptations/{row.id}"}
    return JSONResponse(found, status_code=202 if is_new else 200, headers=location)
