"""Uploads and the blobs that a tenant owns."""

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import delete as delete_from
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.repositories.rows import insert_or_keep, record_of
from service.db.tables import BlobRow, UploadRow, now
from service.ids import new_id
from service.records import BlobRecord, UploadRecord
from service.states import UploadState


def _record(row: UploadRow) -> UploadRecord:
    record = record_of(UploadRecord, row, state=UploadState)
    object.__setattr__(record, "manifest", tuple(record.manifest))
    return record


def create(
    session: Session, *, purpose: str, manifest: Iterable[Mapping[str, Any]], tenant: str = "default"
) -> UploadRecord:
    """A new open upload for `purpose` "model" or "calibration"."""
    row = UploadRow(
        id=new_id("upload"),
        tenant=tenant,
        purpose=purpose,
        manifest=[dict(entry) for entry in manifest],
        state=UploadState.OPEN.value,
    )
    session.add(row)
    session.flush()
    return _record(row)


def get(session: Session, upload_id: str, tenant: str = "default") -> UploadRecord | None:
    """The tenant's upload, or None."""
    row = session.get(UploadRow, upload_id)
    return _record(row) if row is not None and row.tenant == tenant else None


def find_open(
    session: Session, purpose: str, manifest: list[dict[str, Any]], tenant: str = "default"
) -> UploadRecord | None:
    """The tenant's open upload of exactly these files, among its newest 100, or None."""
    query = select(UploadRow).where(
        UploadRow.tenant == tenant, UploadRow.purpose == purpose, UploadRow.state == UploadState.OPEN.value
    )
    rows = session.scalars(query.order_by(UploadRow.created_at.desc(), UploadRow.id.desc()).limit(100))
    return next((_record(row) for row in rows if row.manifest == manifest), None)


def complete(session: Session, upload_id: str, tenant: str = "default") -> UploadRecord:
    """Mark an upload complete. Raises LookupError when there is none."""
    row = session.get(UploadRow, upload_id, with_for_update=True)
    if row is None or row.tenant != tenant:
        raise LookupError(f"Upload must exist. Got {upload_id}.")
    row.state = UploadState.COMPLETE.value
    session.flush()
    return _record(row)


def delete(session: Session, upload_id: str) -> None:
    """Forget an upload; blobs that have arrived stay."""
    session.execute(delete_from(UploadRow).where(UploadRow.id == upload_id))


def record_blob(session: Session, sha256: str, size: int, tenant: str = "default") -> bool:
    """Remember that the tenant sent this verified blob. True the first time."""
    values = {"tenant": tenant, "sha256": sha256, "size": size, "created_at": now()}
    return insert_or_keep(session, BlobRow, values)


def get_blob(session: Session, sha256: str, tenant: str = "default") -> BlobRecord | None:
    """The tenant's blob, or None when this tenant never sent it."""
    row = session.get(BlobRow, (tenant, sha256))
    return None if row is None else record_of(BlobRecord, row)


def known_blobs(session: Session, digests: Iterable[str], tenant: str = "default") -> frozenset[str]:
    """Which of `digests` the tenant has already sent."""
    wanted = sorted(set(digests))
    found: set[str] = set()
    for start in range(0, len(wanted), 500):
        chunk = wanted[start : start + 500]
        query = select(BlobRow.sha256).where(BlobRow.tenant == tenant, BlobRow.sha256.in_(chunk))
        found.update(session.scalars(query))
    return frozenset(found)
