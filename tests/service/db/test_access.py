"""Keys, quotas, the audit log, and whose job is next: on SQLite and PostgreSQL."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from service.access import Access, Scope, new_key
from service.db import migrate
from service.db.engine import Database
from service.db.repositories import audit, calibrations, jobs, keys, leases, models, tenants, uploads
from service.db.repositories.leases import Owner
from service.records import Cursor, KeyRecord
from service.states import InputState, JobKind, JobState

OWNER = Owner("one", "host", 1, "boot/1")
USUAL = {"jobs": 5, "bytes": 100, "running": 0}


def make(database: Database, tenant: str = "a", **more: Any) -> KeyRecord:
    key = new_key()
    with database.write() as session:
        return keys.create(
            session, tenant=tenant, name="", scope=Scope.SUBMIT, prefix=key.prefix, digest=key.digest, **more
        )


def queue(database: Database, tenant: str) -> str:
    with database.write() as session:
        return jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d", tenant=tenant).id


def claim(database: Database, most: int = 0) -> str | None:
    with database.write() as session:
        job = leases.claim(session, OWNER, 3600, most_running=most)
    return None if job is None else job.tenant


def test_keys_are_found_listed_and_revoked(database: Database) -> None:
    with database.read() as session:
        assert not keys.exist(session)
    first, second = make(database, "a"), make(database, "b")
    with database.read() as session:
        assert keys.find(session, first.prefix) == first
        assert keys.find(session, "0" * 12) is None
        assert keys.list_all(session) == (first, second)
        assert keys.list_all(session, "b") == (second,)
    with database.write() as session:
        revoked = keys.revoke(session, first.id)
        assert revoked is not None
        assert keys.revoke(session, first.prefix) == revoked
        assert keys.revoke(session, "key_0") is None
        assert keys.usable(session)
        keys.revoke(session, second.id)
        assert not keys.usable(session)
        assert keys.exist(session)
    assert revoked.state(datetime.now(UTC)) == "revoked"


def test_a_key_expires(database: Database) -> None:
    now = datetime.now(UTC)
    gone = make(database, expires_at=now - timedelta(seconds=1))
    with database.read() as session:
        assert not keys.usable(session)
    lasting = make(database, expires_at=now + timedelta(days=1))
    assert (gone.state(now), lasting.state(now)) == ("expired", "active")
    assert lasting.state(now + timedelta(days=2)) == "expired"
    with database.read() as session:
        assert keys.usable(session)


def test_quotas_are_the_tenants_own_or_the_usual_ones(database: Database) -> None:
    with database.write() as session:
        assert tenants.limits(session, "a", USUAL) == USUAL
        tenants.set_quotas(session, "a", {"jobs": 0, "bytes": 7})
        assert tenants.limits(session, "a", USUAL) == {"jobs": 0, "bytes": 7, "running": 0}
        tenants.set_quotas(session, "a", {"jobs": None})
        assert tenants.limits(session, "a", USUAL)["jobs"] == 5
        assert [record.name for record in tenants.list_all(session)] == ["a"]


def test_what_is_in_use_counts_each_content_once_and_nothing_deleted(database: Database) -> None:
    def files(*names: str) -> list[dict[str, Any]]:
        return [{"path": name, "sha256": name, "size": 10} for name in names]

    with database.write() as session:
        model = models.create(session, source={"files": files("x", "y")}, digest="m", tenant="a")
        models.create(session, source={"files": files("q")}, digest="m", tenant="b")
        calibrations.create(session, source={"files": files("y", "z")}, digest="c", kind="text", tenant="a")
        upload = uploads.create(session, purpose="model", manifest=files("z", "w"), tenant="a")
        jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d", tenant="a")
        made = jobs.create(session, kind=JobKind.WRITE_CHECKPOINT, request={}, request_digest="e", tenant="a")
        held = leases.claim_job(session, made.id, OWNER, 60)
        assert held is not None
        leases.finish(
            session, made.id, held.epoch, JobState.SUCCEEDED, summary={"sha256": "k", "bytes": 1000}
        )
        use = tenants.usage(session, "a", USUAL)
        assert use == {
            "jobs": {"limit": 5, "used": 1},
            "bytes": {"limit": 100, "used": 1040},
            "running": {"limit": None, "used": 0},
        }
        models.set_state(session, model.id, InputState.DELETED)
        uploads.delete(session, upload.id)
        assert set(tenants.blobs_in_use(session, "a")) == {"y", "z", "k"}


def test_the_tenant_with_the_fewest_running_is_next(database: Database) -> None:
    for tenant in ("a", "a", "a", "b", "c"):
        queue(database, tenant)
    assert [claim(database) for _ in range(6)] == ["a", "b", "c", "a", "a", None]


def test_a_tenant_at_its_limit_waits(database: Database) -> None:
    for tenant in ("a", "a", "b", "b", "b"):
        queue(database, tenant)
    with database.write() as session:
        tenants.set_quotas(session, "b", {"running": 2})
    assert [claim(database, 1) for _ in range(4)] == ["a", "b", "b", None]
    with database.write() as session:
        held = next(job for job in jobs.unfinished(session, "a") if job.state == JobState.RUNNING)
        leases.finish(session, held.id, held.epoch, JobState.SUCCEEDED)
    assert claim(database, 1) == "a"


def test_a_lost_lease_does_not_count(database: Database) -> None:
    queue(database, "a")
    with database.write() as session:
        assert leases.claim(session, OWNER, -1, most_running=1) is not None
    assert claim(database, 1) == "a"


def test_runners_that_claim_at_once_keep_the_limit(database: Database, database_url: str) -> None:
    for _ in range(8):
        queue(database, "a")
    claimed: list[str | None] = []

    def run() -> None:
        own = Database(database_url)
        claimed.append(claim(own, 2))
        own.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(tenant is not None for tenant in claimed) <= 2
    claim(database, 2)
    claim(database, 2)
    with database.read() as session:
        assert tenants.running_jobs(session, "a") == 2


def test_the_audit_log_is_paged_by_tenant(database: Database) -> None:
    def write(tenant: str, path: str) -> str:
        with database.write() as session:
            return audit.begin(
                session,
                Access(tenant, Scope.SUBMIT, "key_1"),
                action="submit",
                method="POST",
                path=path,
                peer="192.0.2.1",
                request_id="req_1",
            )

    made = [write("a", f"/v1/{number}") for number in range(3)]
    write("b", "/v1/" + "x" * 1000)
    with database.write() as session:
        audit.finish(session, made[0], 202)
    with database.read() as session:
        newest = audit.list_page(session, tenant="a", limit=2)
        after = Cursor(newest[-1].created_at, newest[-1].id)
        rest = audit.list_page(session, tenant="a", limit=2, after=after)
        everything = audit.newest(session, 10)
        assert audit.newest(session, 10, "b") == everything[:1]
    assert [row.id for row in (*newest, *rest)] == made[::-1]
    assert [row.status for row in (*newest, *rest)] == [None, None, 202]
    assert len(everything) == 4
    assert len(everything[0].path) == 300


def test_a_database_of_the_first_schema_is_upgraded_and_goes_on(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url, "0001")
    database = Database(empty_database_url)
    with database.write_connection() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, tenant, kind, state, done, total, request, request_digest, epoch,"
                " cancel_requested, version, created_at) VALUES ('job_1', 'default', 'search', 'queued', 0, 0,"
                " '{}', 'd', 0, :no, 1, '2026-11-20 00:00:00+00:00')"
            ),
            {"no": False},
        )
    migrate.upgrade(empty_database_url)
    with database.read() as session:
        assert not keys.exist(session)
    assert claim(database) == "default"
    make(database, "default")
    database.close()
