"""Whether the process lives, and whether it can do its work."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.api.context import Ctx
from service.api.guarded import Guarded
from service.errors import Unavailable

router = APIRouter(tags=["health"], route_class=Guarded)


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(context: Ctx) -> dict[str, Any]:
    """The database answers and the data directory can be written."""
    try:
        with context.database.read() as session:
            session.execute(text("SELECT 1"))
        probe = context.settings.data_dir / "tmp"
        probe.mkdir(parents=True, exist_ok=True)
        (probe / ".ready").write_bytes(b"")
    except (DBAPIError, OSError) as error:
        raise Unavailable(
            "not-ready",
            f"Database and data directory must be usable. Got {type(error).__name__}. See the server's log.",
            headers={"Retry-After": "5"},
        ) from error
    return {"status": "ready"}
