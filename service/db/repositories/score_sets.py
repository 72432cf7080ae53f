"""Score sets: the circumstances under which two measurements are the same measurement."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import ScoreSetRow, now
from service.records import ScoreSetRecord


def ensure(
    session: Session, digest: str, settings: Mapping[str, Any], tenant: str = "default"
) -> ScoreSetRecord:
    """The score set with this digest, made now if nobody needed it before."""
    values = {"digest": digest, "tenant": tenant, "settings": dict(settings), "created_at": now()}
    insert_or_keep(session, ScoreSetRow, values)
    return record_of(ScoreSetRecord, session.get_one(ScoreSetRow, digest))


def get(session: Session, digest: str, tenant: str | None = None) -> ScoreSetRecord | None:
    """The score set, or None; with `tenant`, only when it is that tenant's."""
    row = session.get(ScoreSetRow, digest)
    return record_of(ScoreSetRecord, row) if row is not None and tenant in (None, row.tenant) else None
