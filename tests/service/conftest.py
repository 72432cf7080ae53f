"""One database per test, on SQLite and, where BITPLAN_TEST_POSTGRES_URL names a server, on PostgreSQL."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

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
