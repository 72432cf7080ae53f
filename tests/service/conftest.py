"""One database per test, on SQLite and, where BITPLAN_TEST_POSTGRES_URL names a server, on PostgreSQL; and
`bitplan run` of small models.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from service.db import migrate
from service.db.engine import Database

POSTGRES = os.environ.get("BITPLAN_TEST_POSTGRES_URL")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables that only this test uses."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    if not POSTGRES:
        pytest.skip("BITPLAN_TEST_POSTGRES_URL is not set")
    name = f"bitplan_test_{uuid.uuid4().hex}"
    _administer(f'CREATE DATABASE "{name}"')
    yield make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    _administer(f'DROP DATABASE "{name}" WITH (FORCE)')


def _administer(statement: str) -> None:
    engine = create_engine(POSTGRES or "", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """The URL of a migrated database that only this test uses."""
    migrate.upgrade(empty_database_url)
    return empty_database_url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database that only this test uses."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def run_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """run_factory(model, *options): `bitplan run` of a tiny factory model, quickly, in this process; every
    call of a test on one data directory. A later option wins over an earlier one.
    """
    from typer.testing import CliRunner

    from service.cli.main import app

    monkeypatch.setenv("BITPLAN_EXECUTOR", "in_process")

    def run(model: Any, *options: object) -> Any:
        line = ["run", "--factory", model.location, "-c", model.data, "--data-dir", tmp_path / "data"]
        few = ["--schemes", "w2,w4,w8", "--task", model.task, "--samples", "8", "--evaluations", "0"]
        return CliRunner().invoke(app, [str(option) for option in (*line, *few, *options)])

    return run
