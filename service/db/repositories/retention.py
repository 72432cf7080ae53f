"""What may be deleted, because nothing that is kept refers to it; and the deletions.

Whoever makes a row that refers to an older one (an upload to blobs that were sent before, a job to its score
set) calls `share` first, in the same transaction; deletions happen under `exclude`. So nothing disappears
between being looked up and being referred to. SQLite has one writer at a time and needs neither.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import delete, func, or_, select, text
from sqlalchemy.orm import Session

from service.db.tables import (
    BlobRow,
    CalibrationRow,
    FaultRow,
    IdempotencyKeyRow,
    JobRow,
    ModelRow,
    PlanRow,
    ScoreRow,
    ScoreSetRow,
    UnitRow,
    UploadRow,
)
from service.records import HUB
from service.states import TERMINAL, InputState, JobKind, UploadState

RETENTION_LOCK = 0x6269_7470_6C61_6E01
ENDED = [state.value for state in TERMINAL]
CHUNK = 500
DIGEST = re.compile("[0-9a-f]{64}")
Blob = tuple[str, str]
"""A tenant and a digest."""
Inputs = Literal["model", "calibration"]
TABLES: Mapping[Inputs, type[ModelRow] | type[CalibrationRow]] = {
    "model": ModelRow,
    "calibration": CalibrationRow,
}


def share(session: Session) -> None:
    """Nothing is collected until this transaction ends."""
    _lock(session, "pg_advisory_xact_lock_shared")


def exclude(session: Session) -> None:
    """Nobody refers to anything older until this transaction ends; waits for those who do."""
    _lock(session, "pg_advisory_xact_lock")


def _lock(session: Session, function: str) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT {function}(:key)"), {"key": RETENTION_LOCK})


def expired_jobs(session: Session, before: datetime) -> frozenset[str]:
    """Finished jobs that nobody has used since: they ended before, their newest plan is older, and no job
    that is kept (a measurement, a checkpoint, a correlation) is about them.
    """
    newest = (
        select(PlanRow.job_id, func.max(PlanRow.created_at).label("at")).group_by(PlanRow.job_id).subquery()
    )
    query = (
        select(JobRow.id)
        .outerjoin(newest, newest.c.job_id == JobRow.id)
        .where(JobRow.state.in_(ENDED), JobRow.finished_at < before)
        .where(func.coalesce(newest.c.at, JobRow.finished_at) < before)
    )
    old = frozenset(session.scalars(query))
    if not old:
        return old
    about = JobRow.request["job"].as_string()
    others = session.execute(select(JobRow.id, about).where(about.is_not(None)))
    return old - {subject for ident, subject in others if ident not in old}


def delete_jobs(session: Session, before: datetime, idents: Collection[str]) -> frozenset[str]:
    """Delete those that are still expired, with their events and plans; which ones."""
    exclude(session)
    gone = expired_jobs(session, before) & frozenset(idents)
    session.execute(delete(JobRow).where(JobRow.id.in_(sorted(gone))))
    return gone


def idle_score_sets(session: Session, before: datetime, without_jobs: Collection[str] = ()) -> frozenset[str]:
    """Score sets that no job has (but `without_jobs`) and whose model is gone, so that nothing can use
    them.
    """
    sets = session.execute(
        select(ScoreSetRow.digest, ScoreSetRow.tenant, ScoreSetRow.settings).where(
            ScoreSetRow.created_at < before
        )
    )
    idle = {digest: (tenant, settings.get("model")) for digest, tenant, settings in sets}
    if not idle:
        return frozenset()
    there = select(ModelRow.tenant, ModelRow.digest).where(ModelRow.state != InputState.DELETED.value)
    kept = {(tenant, digest) for tenant, digest in session.execute(there)}
    left_out = frozenset(without_jobs)
    holders = session.execute(select(JobRow.id, JobRow.score_set).where(JobRow.score_set.is_not(None)))
    used = {digest for ident, digest in holders if ident not in left_out}
    return frozenset(digest for digest, model in idle.items() if model not in kept and digest not in used)


def delete_score_sets(session: Session, before: datetime, digests: Collection[str]) -> frozenset[str]:
    """Delete those that are still idle, with their scores, units and faults; which ones."""
    exclude(session)
    gone = idle_score_sets(session, before) & frozenset(digests)
    for table in (FaultRow, ScoreRow, UnitRow):
        session.execute(delete(table).where(table.score_set.in_(sorted(gone))))
    session.execute(delete(ScoreSetRow).where(ScoreSetRow.digest.in_(sorted(gone))))
    return gone


def old_uploads(session: Session, before: datetime) -> tuple[tuple[str, str], ...]:
    """Tenant and id of uploads that are open, were opened before, and have received no blob since."""
    query = select(UploadRow).where(UploadRow.state == UploadState.OPEN.value, UploadRow.created_at < before)
    young = select(BlobRow.tenant, BlobRow.sha256).where(BlobRow.created_at >= before)
    fresh = {(tenant, sha256) for tenant, sha256 in session.execute(young)}
    return tuple(
        (row.tenant, row.id)
        for row in session.scalars(query.order_by(UploadRow.id))
        if not any((row.tenant, file["sha256"]) in fresh for file in row.manifest)
    )


def delete_uploads(session: Session, before: datetime, idents: Collection[str]) -> frozenset[str]:
    """Delete those that still are old and open; which ones."""
    exclude(session)
    gone = frozenset(ident for _, ident in old_uploads(session, before)) & frozenset(idents)
    session.execute(delete(UploadRow).where(UploadRow.id.in_(sorted(gone))))
    return gone


def complete_uploads(session: Session, before: datetime) -> frozenset[str]:
    """Uploads that became a model or calibration set and were opened before; what they became stays."""
    done = UploadRow.state == UploadState.COMPLETE.value
    return frozenset(session.scalars(select(UploadRow.id).where(done, UploadRow.created_at < before)))


def delete_complete_uploads(session: Session, idents: Collection[str]) -> frozenset[str]:
    """Delete them; a complete upload stays complete."""
    session.execute(delete(UploadRow).where(UploadRow.id.in_(sorted(idents))))
    return frozenset(idents)


def tombstones(
    session: Session, kind: Inputs, before: datetime, without_jobs: Collection[str] = ()
) -> frozenset[str]:
    """Rows of inputs of this kind that were made before and are deleted, and that no job is about but
    `without_jobs` and verifications.
    """
    table = TABLES[kind]
    gone = select(table.id).where(table.state == InputState.DELETED.value, table.created_at < before)
    found = frozenset(session.scalars(gone))
    if not found:
        return found
    names = (JobRow.request[kind].as_string(), JobRow.request["search"][kind].as_string())
    jobs = select(JobRow.id, *names).where(JobRow.kind != JobKind.VERIFY_MODEL.value)
    left_out = frozenset(without_jobs)
    used = {
        name
        for ident, *named in session.execute(jobs.execution_options(yield_per=CHUNK))
        if ident not in left_out
        for name in named
    }
    return found - used


def delete_tombstones(
    session: Session, kind: Inputs, before: datetime, idents: Collection[str]
) -> frozenset[str]:
    """Delete those that still are without a job; which ones."""
    exclude(session)
    gone = tombstones(session, kind, before) & frozenset(idents)
    session.execute(delete(TABLES[kind]).where(TABLES[kind].id.in_(sorted(gone))))
    return gone


def old_keys(session: Session, before: datetime) -> int:
    """How many idempotency keys were used before and not since."""
    query = select(func.count()).select_from(IdempotencyKeyRow)
    return int(session.scalar(query.where(IdempotencyKeyRow.created_at < before)) or 0)


def delete_keys(session: Session, before: datetime) -> int:
    """Delete them; how many there were."""
    count = old_keys(session, before)
    session.execute(delete(IdempotencyKeyRow).where(IdempotencyKeyRow.created_at < before))
    return count


def old_blobs(session: Session, before: datetime) -> dict[Blob, int]:
    """Blobs with a row that was made before, and their bytes."""
    query = select(BlobRow.tenant, BlobRow.sha256, BlobRow.size).where(BlobRow.created_at < before)
    return {(tenant, sha256): size for tenant, sha256, size in session.execute(query)}


def needed_blobs(
    session: Session,
    wanted: Collection[Blob],
    *,
    without_jobs: Collection[str] = (),
    without_sets: Collection[str] = (),
    without_uploads: Collection[str] = (),
) -> frozenset[Blob]:
    """Which of `wanted` something refers to: models and calibration sets that are not deleted, open uploads,
    units and faults of score sets, summaries of jobs.
    """
    asked = frozenset(wanted)
    found = set(_named(session, frozenset(without_jobs), frozenset(without_uploads))) & asked
    sets, digests = frozenset(without_sets), sorted({digest for _, digest in asked})
    for start in range(0, len(digests), CHUNK):
        query = (
            select(ScoreSetRow.tenant, UnitRow.artifact, UnitRow.score_set)
            .join(ScoreSetRow, ScoreSetRow.digest == UnitRow.score_set)
            .where(UnitRow.artifact.in_(digests[start : start + CHUNK]))
        )
        for tenant, artifact, score_set in session.execute(query):
            if score_set not in sets and artifact is not None:
                found.add((tenant, artifact))
    return frozenset(found)


def promised_blobs(session: Session) -> Iterator[Blob]:
    """Every blob that some row says is there."""
    yield from _sources(session, frozenset(), arrived=True)
    yield from _faulty(session)
    for _, tenant, summary in _summaries(session):
        told = (summary.get("sha256"), (summary.get("interactions") or {}).get("factor"))
        yield from ((tenant, str(digest)) for digest in told if digest is not None)
    artifacts = (
        select(ScoreSetRow.tenant, UnitRow.artifact)
        .join(ScoreSetRow, ScoreSetRow.digest == UnitRow.score_set)
        .where(UnitRow.artifact.is_not(None))
        .distinct()
    )
    yield from ((tenant, str(artifact)) for tenant, artifact in session.execute(artifacts))
    sent = select(BlobRow.tenant, BlobRow.sha256)
    yield from ((tenant, sha256) for tenant, sha256 in session.execute(sent))


def _named(session: Session, jobs: frozenset[str], uploads: frozenset[str]) -> Iterator[Blob]:
    """The blobs that rows may name in their JSON, jobs and uploads of these ids left out. Whatever looks like
    a digest in the summary of a job is taken for one: its checkpoint, its interactions, and what comes next.
    """
    yield from _sources(session, uploads)
    yield from _faulty(session)
    for ident, tenant, summary in _summaries(session):
        if ident not in jobs:
            yield from ((tenant, digest) for digest in _digests_in(summary))


def _sources(session: Session, uploads: frozenset[str], *, arrived: bool = False) -> Iterator[Blob]:
    """The files of models, of calibration sets, and of uploads that are open; with `arrived` without those
    that are still on their way.
    """
    for table in (ModelRow, CalibrationRow):
        query = select(table.tenant, table.source).where(table.state != InputState.DELETED.value)
        if arrived:
            fetched = table.source["kind"].as_string() != HUB
            query = query.where(or_(fetched, table.summary.is_not(None)))
        for tenant, source in session.execute(query):
            yield from ((tenant, file["sha256"]) for file in source.get("files", ()))
    if arrived:
        return
    opened = select(UploadRow.id, UploadRow.tenant, UploadRow.manifest).where(
        UploadRow.state == UploadState.OPEN.value
    )
    for ident, tenant, manifest in session.execute(opened):
        if ident not in uploads:
            yield from ((tenant, file["sha256"]) for file in manifest)


def _summaries(session: Session) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    query = select(JobRow.id, JobRow.tenant, JobRow.summary).where(JobRow.summary.is_not(None))
    for ident, tenant, summary in session.execute(query.execution_options(yield_per=CHUNK)):
        yield ident, tenant, summary or {}


def _digests_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if DIGEST.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _digests_in(member)
    elif isinstance(value, list):
        for member in value:
            yield from _digests_in(member)


def _faulty(session: Session) -> Iterator[Blob]:
    """The arrays that a repeated unit gave, kept beside those that it should have given."""
    query = select(ScoreSetRow.tenant, FaultRow.kept, FaultRow.got).join(
        ScoreSetRow, ScoreSetRow.digest == FaultRow.score_set
    )
    for tenant, kept, got in session.execute(query):
        yield from ((tenant, side["artifact"]) for side in (kept, got) if side.get("artifact") is not None)


def delete_blobs(session: Session, blobs: Collection[Blob]) -> frozenset[Blob]:
    """Forget those that nothing needs at this moment; their files may be removed when this has committed."""
    exclude(session)
    gone = frozenset(blobs) - needed_blobs(session, blobs)
    for tenant in sorted({tenant for tenant, _ in gone}):
        digests = sorted(digest for owner, digest in gone if owner == tenant)
        for start in range(0, len(digests), CHUNK):
            chunk = digests[start : start + CHUNK]
            session.execute(delete(BlobRow).where(BlobRow.tenant == tenant, BlobRow.sha256.in_(chunk)))
    return gone


def kept_models(session: Session) -> frozenset[Blob]:
    """Tenant and digest of every model that is not deleted: the folders that jobs may read."""
    query = select(ModelRow.tenant, ModelRow.digest).where(ModelRow.state != InputState.DELETED.value)
    return frozenset((tenant, digest) for tenant, digest in session.execute(query))
