"""`/v1/adaptations/{id}/study`: how a document was studied, for its owner. Holds document text."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from imprint.server.auth import Owner
from imprint.server.routes.described import described
from imprint.server.services import FromApp
from imprint.server.study_schemas import StudyProfile, StudySteps, StudyTokens

router = APIRouter(prefix="/v1/adaptations/{id}/study")

After = Annotated[int, Query(ge=0, le=2**31)]


@router.get("", **described(StudySteps, 404, 409, 410))
async def steps(
    id: str,
    owner: Owner,
    services: FromApp,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=64)] = 16,
) -> dict[str, Any]:
    """What the steps behind step `after` tried: positions, with cue, truth, rollouts, rewards."""
    row = await services.jobs.get(id, owner)
    return await services.studies.steps(row, after=after, limit=limit)


@router.get("/profile", **described(StudyProfile, 404, 409, 410))
async def profile(id: str, owner: Owner, services: FromApp) -> dict[str, Any]:
    """The whole document's entropy in at most 240 pieces, and the bounds of most of its tokens."""
    row = await services.jobs.get(id, owner)
    return await services.studies.profile(row)


@router.get("/tokens", **described(StudyTokens, 404, 409, 410))
async def tokens(
    id: str,
    owner: Owner,
    services: FromApp,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 2000,
) -> dict[str, Any]:
    """The document behind token `after`, token by token, with the entropy in nats before each."""
    row = await services.jobs.get(id, owner)
    return await services.studies.tokens(row, after=after, limit=limit)
