import math
import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError, StatementError

from service.db.engine import Database, DatabaseUrlError, database_clock, parse_url
from service.db.tables import BlobRow, EventRow, FaultRow


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("sqlite:////tmp/x.db", "sqlite"),
        ("postgresql://u@h/d", "postgresql+psycopg"),
        ("postgres://u@h/d", "postgresql+psycopg"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg"),
    ],
)
def test_urls_get_their_driver(url: str, driver: str) -> None:
    assert parse_url(url).drivername == driver


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://u@h/d"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(DatabaseUrlError, match=r"Use sqlite:////absolute/path\.db or postgresql://"):
        parse_url(url)


def test_a_write_that_raises_changes_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError):
        insert_and_raise(database)
    with database.read() as session:
        assert session.scalars(select(BlobRow)).all() == []


def insert_and_raise(database: Database) -> None:
    with database.write() as session:
        session.add(BlobRow(tenant="default", sha256="aa", size=1))
        session.flush()
        raise RuntimeError


def test_a_read_keeps_nothing(database: Database) -> None:
    with database.read() as session:
        session.add(BlobRow(tenant="default", sha256="aa", size=1))
        session.flush()
    with database.read() as session:
        assert session.scalars(select(BlobRow)).all() == []


def test_times_come_back_in_utc(database: Database) -> None:
    at = datetime(2026, 11, 20, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=-8)))
    with database.write() as session:
        session.add(BlobRow(tenant="default", sha256="aa", size=2**40, created_at=at))
    with database.read() as session:
        row = session.get_one(BlobRow, ("default", "aa"))
    assert row.created_at == at
    assert row.created_at.tzinfo == UTC
    assert row.size == 2**40


def test_naive_times_are_refused(database: Database) -> None:
    with pytest.raises(StatementError, match="A time must be aware"), database.write() as session:
        session.add(BlobRow(tenant="default", sha256="aa", size=1, created_at=datetime(2026, 1, 1)))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_columns_refuse_what_json_has_not(database: Database, number: float) -> None:
    with pytest.raises((StatementError, ValueError)), database.write() as session:
        session.add(EventRow(job_id="j", seq=1, type="t", data={"x": number}))


def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(FaultRow(id="f", score_set="missing", unit_key="u", kept={}, got={}))


def test_the_clock_is_the_present_in_seconds(database: Database) -> None:
    with database.read() as session:
        seconds = session.scalars(select(database_clock())).one()
    assert abs(seconds - datetime.now(UTC).timestamp()) < 60


def test_writers_wait_for_each_other(database: Database) -> None:
    """Every increment survives: without the write lock at the beginning, some would be lost or refused."""
    with database.write() as session:
        session.add(BlobRow(tenant="default", sha256="aa", size=0))

    def increment() -> None:
        for _ in range(10):
            with database.write() as session:
                row = session.get_one(BlobRow, ("default", "aa"), with_for_update=True)
                row.size += 1

    threads = [threading.Thread(target=increment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.get_one(BlobRow, ("default", "aa")).size == 40


@pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
def test_sqlite_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.write() as session:
        session.add(BlobRow(tenant="default", sha256="aa", size=1))
        session.flush()
        with database.read() as reader:
            assert reader.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
            assert reader.scalars(select(BlobRow)).all() == []


@pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
def test_sqlite_says_busy_after_its_patience(database: Database, database_url: str) -> None:
    other = Database(database_url)
    with other.write() as session, database.engine.connect() as connection:
        session.execute(text("SELECT 1"))
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("PRAGMA busy_timeout = 1")
        with pytest.raises(OperationalError, match="locked"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
    other.close()
