"""`/v1/adaptations/{id}/adapter` and `/v1/adapters`: adapters as files."""

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from imprint.server.auth import Owner
from imprint.server.errors import GoneError
from imprint.server.routes.described import described_file
from imprint.server.services import FromApp

router = APIRouter()


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
