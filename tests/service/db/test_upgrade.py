"""Databases that earlier versions left behind become today's, with every row.

``data/REVISION.*.sql`` are such databases; `stored_databases.py` made them and says when to make the next.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, select, text

from service.db import migrate
from service.db.engine import Database, parse_url
from service.db.repositories import calibrations, events, jobs, leases, models, plans, scores, units, uploads
from service.db.repositories.leases import Owner

DATA = Path(__file__).with_name("data")
REVISIONS = [script.revision for script in migrate.scripts().walk_revisions()][::-1]
EARLIER = REVISIONS[:-1]
Rows = dict[str, list[dict[str, Any]]]


def load(url: str, revision: str) -> None:
    """A database as it was stored."""
    parsed = parse_url(url)
    script = (DATA / f"{revision}.{parsed.get_backend_name()}.sql").read_text(encoding="utf-8")
    if parsed.drivername == "sqlite":
        with closing(sqlite3.connect(str(parsed.database))) as connection:
            connection.executescript(script)
        return
    with closing(Database(url)) as database, database.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute(script)
        driver.commit()


def rows_of(url: str) -> Rows:
    """Every row of every table, but for the schema's version."""
    metadata = MetaData()
    with closing(Database(url)) as database, database.engine.connect() as connection:
        metadata.reflect(connection)
        return {
            table.name: sorted((dict(row) for row in connection.execute(select(table)).mappings()), key=repr)
            for table in metadata.sorted_tables
            if table.name != "alembic_version"
        }


def of_columns(rows: Rows, like: Rows) -> Rows:
    """The part of `rows` that `like` has tables and columns for."""
    return {
        name: sorted(({key: row[key] for key in like[name][0]} for row in rows[name]), key=repr)
        for name in like
    }


def test_every_earlier_version_has_its_stored_databases() -> None:
    stored = {path.name for path in DATA.glob("*.sql")}
    wanted = {f"{revision}.{kind}.sql" for revision in EARLIER for kind in ("sqlite", "postgresql")}
    assert wanted <= stored, "Run: python -m tests.service.db.stored_databases REVISION postgresql://..."


@pytest.mark.parametrize("revision", EARLIER)
def test_an_upgrade_keeps_every_row(empty_database_url: str, revision: str) -> None:
    load(empty_database_url, revision)
    assert migrate.current(empty_database_url) == revision
    before = rows_of(empty_database_url)
    assert all(before.values()), "a stored database has rows in every table"
    assert migrate.upgrade(empty_database_url) == migrate.newest()
    assert of_columns(rows_of(empty_database_url), before) == before
    migrate.downgrade(empty_database_url, revision)
    assert rows_of(empty_database_url) == before


@pytest.mark.parametrize("revision", EARLIER)
def test_an_upgraded_database_works(empty_database_url: str, revision: str) -> None:
    load(empty_database_url, revision)
    migrate.upgrade(empty_database_url)
    with closing(Database(empty_database_url)) as database, database.write() as session:
        job = jobs.get(session, "job_1", "default")
        assert job is not None
        assert job.summary is not None
        assert (list(job.summary), job.request["budgets"]) == (["b", "a"], ["3.5 bpw"])
        assert [event.type for event in events.list_after(session, "job_1")] == ["queued"]
        (score,) = scores.list_all(session, "s1")
        assert (score.value, score.stderr) == (0.1 + 0.2, None)
        assert units.keys(session, "s1") == {"score:a:w4:output_kl"}
        (plan,) = plans.list_job(session, "job_1")
        assert plan.document == {"v": 1}
        assert models.get(session, "model_1") is not None
        assert calibrations.get(session, "cal_1") is not None
        assert uploads.known_blobs(session, ["9f" * 32]) == {"9f" * 32}
        claimed = leases.claim(session, Owner("o", "h", 1, "p"), 60)
        assert claimed is not None
        assert (claimed.id, claimed.epoch) == ("job_2", 8)


def test_inventories_move_out_of_summaries_and_back(empty_database_url: str) -> None:
    """With every digit and in the order of the members."""
    text_of = '{"z":0.1,"inventory":{"b":[1,2.50,1e-7],"a":null},"a":{"y":3.0,"x":"é"},"tiny":1e-7}'
    lists = '{"inventory":[1]}'
    load(empty_database_url, "0004")

    def jobs_now() -> dict[str, Any]:
        with closing(Database(empty_database_url)) as database, database.engine.connect() as connection:
            return {row.id: row for row in connection.execute(text("SELECT * FROM jobs"))}

    with closing(Database(empty_database_url)) as database, database.write_connection() as connection:
        for ident, summary in (("job_1", text_of), ("job_2", lists)):
            connection.execute(
                text("UPDATE jobs SET summary = :summary WHERE id = :id"), {"summary": summary, "id": ident}
            )
    migrate.upgrade(empty_database_url, "0005")
    whole = json.loads(text_of)
    moved = jobs_now()
    assert plain(moved["job_1"].inventory) == whole.pop("inventory")
    assert list(plain(moved["job_1"].summary).items()) == list(whole.items())
    assert (plain(moved["job_2"].summary), moved["job_2"].inventory) == (json.loads(lists), None)
    migrate.downgrade(empty_database_url, "0004")
    assert plain(jobs_now()["job_1"].summary) == json.loads(text_of)
    assert plain(jobs_now()["job_2"].summary) == json.loads(lists)


def plain(value: Any) -> Any:
    """JSON as SQLite (text) and PostgreSQL (read already) give it to those who name no type."""
    return json.loads(value) if isinstance(value, str) else value
