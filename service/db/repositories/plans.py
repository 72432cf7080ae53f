"""Plans: what a job answered to a budget."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, page, record_of
from service.db.tables import PlanRow, now
from service.ids import new_id
from service.records import Cursor, PlanRecord


def insert(
    session: Session,
    *,
    job_id: str,
    budget: str,
    settings_digest: str,
    status: str,
    digest: str | None,
    document: Mapping[str, Any] | None,
    result: Mapping[str, Any],
    evidence: Mapping[str, Any] | None = None,
    tenant: str = "default",
) -> PlanRecord:
    """The plan of (job, budget, settings): a new row, or the one that was stored first, unchanged."""
    values: dict[str, Any] = {
        "id": new_id("plan"),
        "tenant": tenant,
        "job_id": job_id,
        "budget": budget,
        "settings_digest": settings_digest,
        "digest": digest,
        "status": status,
        "document": None if document is None else dict(document),
        "result": dict(result),
        "evidence": None if evidence is None else dict(evidence),
        "created_at": now(),
    }
    if insert_or_keep(session, PlanRow, values):
        return PlanRecord(**values)
    stored = find(session, job_id, budget, settings_digest)
    assert stored is not None
    return stored


def find(session: Session, job_id: str, budget: str, settings_digest: str) -> PlanRecord | None:
    """The plan of (job, budget, settings), or None."""
    query = select(PlanRow).where(
        PlanRow.job_id == job_id, PlanRow.budget == budget, PlanRow.settings_digest == settings_digest
    )
    row = session.scalars(query).first()
    return None if row is None else record_of(PlanRecord, row)


def get(session: Session, plan_id: str, tenant: str | None = None) -> PlanRecord | None:
    """The plan, or None; with `tenant`, only when it is that tenant's."""
    row = session.get(PlanRow, plan_id)
    return record_of(PlanRecord, row) if row is not None and tenant in (None, row.tenant) else None


def list_job(session: Session, job_id: str) -> tuple[PlanRecord, ...]:
    """Every plan of a job, the oldest first."""
    query = select(PlanRow).where(PlanRow.job_id == job_id).order_by(PlanRow.created_at, PlanRow.id)
    return tuple(record_of(PlanRecord, row) for row in session.scalars(query))


def list_page(
    session: Session, job_id: str, *, limit: int = 50, after: Cursor | None = None, tenant: str = "default"
) -> tuple[PlanRecord, ...]:
    """A page of a job's plans, the newest first."""
    rows = page(session, PlanRow, tenant, limit, after, PlanRow.job_id == job_id)
    return tuple(record_of(PlanRecord, row) for row in rows)


def set_evidence(
    session: Session, plan_id: str, evidence: Mapping[str, Any], result: Mapping[str, Any] | None = None
) -> PlanRecord:
    """Attach measured evidence (and, if given, the result that names it). Raises LookupError."""
    row = session.get(PlanRow, plan_id, with_for_update=True)
    if row is None:
        raise LookupError(f"Plan must exist. Got {plan_id}.")
    row.evidence = dict(evidence)
    row.result = row.result if result is None else dict(result)
    session.flush()
    return record_of(PlanRecord, row)
