"""Whether the process lives, whether it can do its work, and what it has counted."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict

from service import metrics
from service.api.context import Ctx
from service.api.guarded import Guarded
from service.checks import alive_seconds, free_bytes, readiness
from service.db.repositories import gauges, runners
from service.errors import Unavailable

router = APIRouter(tags=["health"], route_class=Guarded)
TEXT = "text/plain; version=1.0.0; charset=utf-8"


class Readiness(BaseModel):
    """What was checked, and what was found."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["ready"]
    checks: dict[str, str]


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(
    context: Ctx,
    require: Annotated[
        Literal["runner"] | None, Query(description="Not ready without a runner that lives, either.")
    ] = None,
) -> Readiness:
    """The database answers and has the schema of this version, the store can be written and has room. 503
    with the reasons otherwise.

    Without a runner the API is ready all the same, since it takes jobs and plans from stored scores;
    `checks` tells, and `require=runner` makes it a reason.
    """
    found = readiness(context.settings, context.database)
    checks = {check.name: f"{check.state}: {check.detail}" for check in found}
    bad = [
        check.name
        for check in found
        if check.state == "failed" or (check.state, require) == ("warning", check.name)
    ]
    if bad:
        reasons = "; ".join(f"{name}: {checks[name].partition(': ')[2]}" for name in bad)
        raise Unavailable(
            "not-ready",
            f"Database, schema, store{' and runner' if require else ''} must be usable. Got {reasons}",
            extra={"checks": checks},
            headers={"Retry-After": "5"},
        )
    return Readiness(status="ready", checks=checks)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def prometheus(context: Ctx) -> Response:
    """Metrics in the text format of Prometheus: of this process, of the database now, and of each runner as
    it last told.
    """
    free = free_bytes(context.settings)
    with context.database.read() as session:
        now, known = gauges.read(session, free), runners.list_all(session)
    return Response(metrics.exposition(now, known, alive_seconds(context.settings)), media_type=TEXT)
