"""The outbox: due with the end of the job, claimed by one, settled once. On SQLite and PostgreSQL."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from service.db import migrate
from service.db.engine import Database
from service.db.repositories import jobs, leases, webhooks
from service.db.repositories.leases import Owner
from service.records import JobRecord, WebhookRecord
from service.states import JobKind, JobState, WebhookState

OWNER = Owner("one", "host", 1, "boot/1")
LEASE = 3600.0
OVER = -1.0


def submitted(database: Database) -> JobRecord:
    with database.write() as session:
        job = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d")
        webhooks.create(session, job.id, "https://a.example/", "whsec_x")
        return job


def finished(database: Database, state: JobState = JobState.SUCCEEDED) -> JobRecord:
    job = submitted(database)
    with database.write() as session:
        held = leases.claim_job(session, job.id, OWNER, LEASE)
        assert held is not None
        return leases.finish(session, job.id, held.epoch, state)


def webhook(database: Database, job: JobRecord) -> WebhookRecord:
    with database.read() as session:
        found = webhooks.of_job(session, job.id)
    assert found is not None
    return found


def claim(database: Database, lease: float = LEASE) -> WebhookRecord | None:
    with database.write() as session:
        return webhooks.claim(session, lease)


def claimed(database: Database, lease: float = LEASE) -> WebhookRecord:
    found = claim(database, lease)
    assert found is not None
    return found


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_webhook_is_due_when_its_job_has_ended(database: Database, state: JobState) -> None:
    waiting = submitted(database)
    assert claim(database) is None
    ended = finished(database, state)
    found = claimed(database)
    assert (found.job_id, found.state, found.attempts, found.secret) == (ended.id, "pending", 1, "whsec_x")
    assert claim(database) is None
    assert webhook(database, waiting).state == WebhookState.WAITING
    assert "whsec" not in repr(found)


def test_a_cancelled_queued_job_tells_too(database: Database) -> None:
    job = submitted(database)
    with database.write() as session:
        jobs.request_cancel(session, job.id)
    assert claimed(database).job_id == job.id


def cancel_and_fail(database: Database, job: JobRecord) -> None:
    with database.write() as session:
        jobs.request_cancel(session, job.id)
        raise RuntimeError


def test_it_falls_due_with_the_terminal_event_or_not_at_all(database: Database) -> None:
    job = submitted(database)
    with pytest.raises(RuntimeError):
        cancel_and_fail(database, job)
    assert webhook(database, job).state == WebhookState.WAITING
    assert claim(database) is None


def test_a_claim_that_was_not_settled_is_due_again(database: Database) -> None:
    job = finished(database)
    first, second = claimed(database, OVER), claimed(database)
    assert (first.id, first.attempts, second.attempts) == (second.id, 1, 2)
    with database.write() as session:
        webhooks.postpone(session, first, 0.0, 500, "late")
    assert claim(database) is None, "an attempt that was overtaken decides nothing"
    with database.write() as session:
        webhooks.settle(session, first, WebhookState.FAILED, 500, "late")
    assert webhook(database, job).state == WebhookState.PENDING
    with database.write() as session:
        webhooks.settle(session, first, WebhookState.DELIVERED, 200)
    assert webhook(database, job).state == WebhookState.DELIVERED


def test_a_postponed_delivery_waits_and_the_fresh_ones_come_first(database: Database) -> None:
    finished(database)
    first = claimed(database)
    with database.write() as session:
        webhooks.postpone(session, first, LEASE, 503, "HTTP status 503")
    assert claim(database) is None
    with database.write() as session:
        webhooks.postpone(session, first, OVER, 503, "HTTP status 503")
    fresh = finished(database)
    assert claimed(database).job_id == fresh.id
    again = claimed(database)
    assert (again.id, again.attempts, again.last_status, again.last_error) == (
        first.id,
        2,
        503,
        "HTTP status 503",
    )


@pytest.mark.parametrize("state", [WebhookState.DELIVERED, WebhookState.FAILED])
def test_a_settled_delivery_is_final_and_forgets_its_secret(database: Database, state: WebhookState) -> None:
    job = finished(database)
    found = claimed(database, OVER)
    with database.write() as session:
        webhooks.settle(session, found, state, 200, None)
    settled = webhook(database, job)
    assert (settled.state, settled.secret, settled.next_attempt_at) == (state, None, None)
    assert settled.settled_at is not None
    assert claim(database) is None
    with database.write() as session:
        webhooks.settle(session, found, WebhookState.DELIVERED, 204)
    assert webhook(database, job) == settled


def test_a_deleted_job_takes_its_webhook_along(database: Database) -> None:
    job = finished(database)
    found = claimed(database)
    with database.write() as session:
        jobs.delete(session, job.id)
        webhooks.postpone(session, found, 1.0, None, "late")
    with database.read() as session:
        assert webhooks.of_job(session, job.id) is None


def test_nobody_claims_what_another_has(database: Database) -> None:
    every = {finished(database).id for _ in range(6)}
    got: list[str] = []

    def work() -> None:
        while (found := claim(database)) is not None:
            got.append(found.job_id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(every)


def test_an_older_database_is_upgraded_with_its_jobs(empty_database_url: str) -> None:
    """Jobs of before there were webhooks end as they always did."""
    migrate.upgrade(empty_database_url, "0001")
    database = Database(empty_database_url)
    with database.write_connection() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, tenant, kind, state, done, total, request, request_digest, epoch,"
                " cancel_requested, version, created_at) VALUES ('job_1', 'default', 'search', 'queued', 0, 0,"
                " '{}', 'd', 0, false, 1, :at)"
            ),
            {"at": "2026-11-20 00:00:00+00:00"},
        )
    migrate.upgrade(empty_database_url)
    with database.write() as session:
        assert jobs.request_cancel(session, "job_1").state == JobState.CANCELLED
        assert not webhooks.is_due(session)
        webhooks.create(session, "job_1", "https://a.example/", "whsec_x")
    database.close()
    migrate.downgrade(empty_database_url, "0001")
    database = Database(empty_database_url)
    with database.engine.connect() as connection:
        assert connection.execute(text("SELECT state FROM jobs")).scalar_one() == "cancelled"
    database.close()
