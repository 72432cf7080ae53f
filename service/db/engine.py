"""Connections: one `Database` per process, with read and write transactions for SQLite and PostgreSQL."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from sqlalchemy import URL, Connection, Double, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

BUSY_TIMEOUT_MILLISECONDS = 30_000
WRITE = "bitplan_write"
MOST_CONNECTIONS = 15
"""Of a process. All are kept: making one costs more than most requests."""


class DatabaseUrlError(ValueError):
    """The database URL names nothing that Bitplan can use."""


class database_clock(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """Seconds since 1970 by the database's own clock, so that every runner measures leases alike."""

    type = Double()
    inherit_cache = True
    name = "database_clock"


@compiles(database_clock, "postgresql")
def _clock_postgresql(element: database_clock, compiler: SQLCompiler, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_clock, "sqlite")
def _clock_sqlite(element: database_clock, compiler: SQLCompiler, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


def parse_url(url: str) -> URL:
    """The URL with its driver: a SQLite file or a PostgreSQL database through psycopg 3.

    Raises `DatabaseUrlError` for other databases and for SQLite without a file (every connection would see
    its own).
    """
    hint = "Use sqlite:////absolute/path.db or postgresql://user@host/database."
    try:
        parsed = make_url(url)
    except ArgumentError:
        said = f"Got {len(url)} characters that are none"
        raise DatabaseUrlError(f"database_url must be a database URL. {said}. {hint}") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    raise DatabaseUrlError(
        f"database_url must name a SQLite file or a PostgreSQL database. Got {parsed.drivername}. {hint}"
    )


def strict_json(value: object) -> str:
    """JSON without NaN and infinity, which are no JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def make_engine(url: str) -> Engine:
    """An engine whose SQLite connections use WAL and foreign keys, and begin transactions themselves."""
    parsed = parse_url(url)
    if parsed.drivername == "sqlite":
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        parsed,
        json_serializer=strict_json,
        json_deserializer=from_json,
        pool_pre_ping=parsed.drivername != "sqlite",
        pool_size=MOST_CONNECTIONS,
        max_overflow=0,
        pool_use_lifo=True,
        connect_args={} if parsed.drivername == "sqlite" else {"connect_timeout": 10},
    )
    if parsed.drivername == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
    """The driver must not begin by itself (it would begin deferred, and fail to upgrade under load)."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MILLISECONDS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Writers take the write lock at once; readers see one snapshot."""
    writes = connection.get_execution_options().get(WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Database:
    """The way to the rows: ``with database.write() as session: jobs.create(session, ...)``.

    Safe to share between threads; each `read` or `write` is one transaction of its own.
    """

    def __init__(self, url: str):
        self.url = url
        self.engine = make_engine(url)
        self._writer = self.engine.execution_options(**{WRITE: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads; what it saw is discarded at the end."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that commits when the block ends, and rolls back when it raises."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def write_connection(self) -> Iterator[Connection]:
        """The same as `write`, below the ORM: for migrations."""
        with self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()
