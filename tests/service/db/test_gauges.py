"""What monitoring reads of the database."""

from datetime import timedelta

from sqlalchemy import update

from service.db.engine import Database
from service.db.repositories import gauges, jobs, leases, uploads
from service.db.repositories.leases import Owner
from service.db.tables import JobRow, now
from service.records import Gauges
from service.states import JobKind

OWNER = Owner("o", "host", 1, "p")


def test_an_empty_database_has_nothing(database: Database) -> None:
    with database.read() as session:
        assert gauges.read(session, 5) == Gauges({}, 0.0, 0, 0, 0, 0, 5)


def test_the_queue_is_what_waits(database: Database) -> None:
    with database.write() as session:
        made = [jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d") for _ in range(4)]
        for job, seconds in ((made[0], 60), (made[1], -1)):
            leases.claim_job(session, job.id, OWNER, seconds)
        session.execute(
            update(JobRow).where(JobRow.id == made[2].id).values(created_at=now() - timedelta(hours=2))
        )
        for digest in ("a" * 64, "b" * 64):
            uploads.record_blob(session, digest, 2**40)
    with database.read() as session:
        found = gauges.read(session, 0)
    assert found.jobs == {("search", "queued"): 2, ("search", "running"): 2}
    assert (found.queued, found.leases, found.expired_leases) == (2, 2, 1)
    assert 7200 <= found.oldest_queued_seconds < 7300
    assert (found.blobs, found.blob_bytes) == (2, 2**41)
