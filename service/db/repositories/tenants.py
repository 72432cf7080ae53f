"""Tenants: their quotas, and what they have in use."""

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import CalibrationRow, JobRow, ModelRow, TenantRow, UploadRow, now
from service.records import TenantRecord
from service.states import TERMINAL, InputState, JobKind, JobState, UploadState

UNFINISHED = tuple(state.value for state in JobState if state not in TERMINAL)


def ensure(session: Session, name: str) -> TenantRecord:
    """The tenant, made if it is new, locked until the transaction ends: its quotas are used one by one."""
    insert_or_keep(session, TenantRow, {"name": name, "created_at": now()})
    return record_of(TenantRecord, session.get_one(TenantRow, name, with_for_update=True))


def list_all(session: Session) -> tuple[TenantRecord, ...]:
    """Every tenant, by name."""
    return tuple(
        record_of(TenantRecord, row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name))
    )


def set_quotas(session: Session, name: str, quotas: Mapping[str, int | None]) -> TenantRecord:
    """Write quotas (jobs, bytes, running); None is that of the settings, 0 no limit."""
    ensure(session, name)
    row = session.get_one(TenantRow, name)
    for quota, value in quotas.items():
        setattr(row, f"quota_{quota}", value)
    session.flush()
    return record_of(TenantRecord, row)


def limits(session: Session, name: str, usual: Mapping[str, int]) -> dict[str, int]:
    """The quotas of a tenant: its own, or else the usual ones; 0 is no limit."""
    row = session.get(TenantRow, name)
    own: dict[str, Any] = {quota: getattr(row, f"quota_{quota}", None) for quota in usual}
    return {quota: int(usual[quota] if own[quota] is None else own[quota]) for quota in usual}


def usage(session: Session, name: str, usual: Mapping[str, int]) -> dict[str, dict[str, int | None]]:
    """Each quota with its limit (None: none) and what is used."""
    most = limits(session, name, usual)
    used = {
        "jobs": unfinished_jobs(session, name),
        "bytes": sum(blobs_in_use(session, name).values()),
        "running": running_jobs(session, name),
    }
    return {quota: {"limit": most[quota] or None, "used": used[quota]} for quota in used}


def unfinished_jobs(session: Session, name: str) -> int:
    """How many jobs of a tenant wait or run."""
    query = select(func.count()).where(JobRow.tenant == name, JobRow.state.in_(UNFINISHED))
    return int(session.execute(query).scalar_one())


def running_jobs(session: Session, name: str) -> int:
    """How many jobs of a tenant runners hold."""
    held = (JobState.RUNNING.value, JobState.CANCELLING.value)
    query = select(func.count()).where(JobRow.tenant == name, JobRow.state.in_(held))
    return int(session.execute(query).scalar_one())


def blobs_in_use(session: Session, name: str) -> dict[str, int]:
    """Digest -> bytes of what a tenant's models, calibration sets, open uploads and checkpoints hold: each
    content once, that of an open upload as declared, that of deleted things not at all.
    """
    found: dict[str, int] = {}
    for table in (ModelRow, CalibrationRow):
        alive = select(table.source).where(table.tenant == name, table.state != InputState.DELETED.value)
        for source in session.scalars(alive):
            _add(found, source.get("files", ()))
    uploads = select(UploadRow.manifest).where(
        UploadRow.tenant == name, UploadRow.state == UploadState.OPEN.value
    )
    for manifest in session.scalars(uploads):
        _add(found, manifest)
    written = select(JobRow.summary).where(
        JobRow.tenant == name,
        JobRow.kind == JobKind.WRITE_CHECKPOINT.value,
        JobRow.state == JobState.SUCCEEDED.value,
    )
    _add(found, (summary for summary in session.scalars(written) if summary))
    return found


def _add(found: dict[str, int], files: Iterable[Mapping[str, Any]]) -> None:
    found.update({str(file["sha256"]): int(file.get("size", file.get("bytes", 0))) for file in files})
