"""Makes the stored databases of ``data/``: what a service of an earlier schema version left behind, as SQL.

    python -m tests.service.db.stored_databases REVISION postgresql://user:password@host/any

migrates an empty SQLite file and an empty PostgreSQL database to REVISION, inserts rows into every table, and
writes ``data/REVISION.sqlite.sql`` and ``data/REVISION.postgresql.sql``. Run it for the newest revision when
the next one is added; the files never change afterwards.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
import uuid
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    DateTime,
    Double,
    Float,
    Integer,
    MetaData,
    Table,
    create_engine,
    make_url,
    text,
)

from service.db import migrate
from service.db.engine import Database

DATA = Path(__file__).with_name("data")
AT = datetime(2026, 11, 20, 12, 30, 15, 123456, UTC)
SHA = "9f" * 32
JOB = {
    "model": "model_1",
    "calibration": "cal_1",
    "budgets": ["3.5 bpw"],
    "schemes": ["w4"],
    "metrics": ["output_kl"],
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "uploads": [
        {
            "id": "upload_1",
            "purpose": "model",
            "manifest": [{"path": "w", "size": 3, "sha256": SHA}],
            "state": "open",
        }
    ],
    "blobs": [{"sha256": SHA, "size": 2**40}],
    "models": [
        {"id": "model_1", "source": {"kind": "upload", "files": []}, "digest": "ab", "state": "ready"}
    ],
    "calibrations": [
        {
            "id": "cal_1",
            "source": {"kind": "upload", "files": []},
            "digest": "cd",
            "kind": "text",
            "state": "ready",
        }
    ],
    "score_sets": [
        {"digest": "s1", "settings": {"model": "ab", "seed": 0}, "inspection": {"é": [0.1, None]}}
    ],
    "jobs": [
        {
            "id": "job_1",
            "kind": "search",
            "state": "succeeded",
            "request": JOB,
            "score_set": "s1",
            "stage": "measuring",
            "summary": {"b": 1, "a": {"z": 0.1, "y": 3.0}},
            "finished_at": AT,
        },
        {
            "id": "job_2",
            "kind": "search",
            "state": "running",
            "request": JOB,
            "score_set": None,
            "stage": None,
            "lease_expires_at": 1.5e9,
        },
    ],
    "events": [{"job_id": "job_1", "seq": 1, "type": "queued", "data": {}}],
    "units": [{"score_set": "s1", "key": "score:a:w4:output_kl", "kind": "score", "artifact": SHA}],
    "scores": [
        {
            "score_set": "s1",
            "layer": "a",
            "scheme": "w4",
            "metric": "output_kl",
            "value": 0.1 + 0.2,
            "stderr": None,
        }
    ],
    "plans": [
        {"id": "plan_1", "job_id": "job_1", "budget": "3.5 bpw", "status": "optimal", "document": {"v": 1}}
    ],
}
"""What the application itself reads again. Columns that are left out, and tables, are filled by their type."""


def fill(database: Database) -> None:
    """At least one row in every table, with what its columns can hold; references point to rows."""
    metadata = MetaData()
    metadata.reflect(database.engine)
    with database.write_connection() as connection:
        for table in metadata.sorted_tables:
            if table.name != "alembic_version":
                for row in ROWS.get(table.name, [{}]):
                    connection.execute(table.insert().values(_row(table, row)))


def _row(table: Table, given: dict[str, Any]) -> dict[str, Any]:
    return {column.name: given.get(column.name, _value(column)) for column in table.columns} | given


def _value(column: Any) -> Any:
    for key in column.foreign_keys:
        return ROWS.get(key.column.table.name, [{}])[0].get(key.column.name, f"{key.column.name}-1")
    if column.name == "tenant":
        return "default"
    if isinstance(column.type, JSON):
        return {"ü": [1, 0.1, None]}
    if isinstance(column.type, DateTime):
        return AT
    if isinstance(column.type, Boolean):
        return True
    if isinstance(column.type, Integer):
        return 7
    if isinstance(column.type, (Double, Float)):
        return 1.7e9
    return f"{column.name}-1"


def dump_sqlite(revision: str) -> str:
    """The schema and rows of a SQLite database at this revision."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bitplan.db"
        _make(f"sqlite:///{file}", revision)
        with closing(sqlite3.connect(file)) as connection:
            return "\n".join(connection.iterdump()) + "\n"


def dump_postgres(revision: str, server: str) -> str:
    """The same of a PostgreSQL database, which is made on `server` and dropped again."""
    name = f"bitplan_stored_{uuid.uuid4().hex}"
    url = make_url(server).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
        try:
            own = url.set(database=name).render_as_string(hide_password=False)
            _make(own, revision)
            address = own.replace("+psycopg", "")
            command = ["pg_dump", "--inserts", "--no-owner", "--no-privileges", f"--dbname={address}"]
            written = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        finally:
            connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))
    kept = [line for line in written.splitlines() if line and not line.startswith(("--", "\\", "SET "))]
    return "\n".join(line for line in kept if "set_config" not in line) + "\n"


def _make(url: str, revision: str) -> None:
    migrate.upgrade(url, revision)
    with closing(Database(url)) as database:
        fill(database)


def main() -> None:
    revision, server = sys.argv[1:]
    DATA.mkdir(exist_ok=True)
    (DATA / f"{revision}.sqlite.sql").write_text(dump_sqlite(revision), encoding="utf-8")
    (DATA / f"{revision}.postgresql.sql").write_text(dump_postgres(revision, server), encoding="utf-8")


if __name__ == "__main__":
    main()
