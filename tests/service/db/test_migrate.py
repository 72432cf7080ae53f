import re
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from service.db import migrate
from service.db.engine import Database
from service.db.tables import Base


def tables(url: str) -> set[str]:
    database = Database(url)
    names = set(inspect(database.engine).get_table_names())
    database.close()
    return names


def test_up_down_and_up_again(empty_database_url: str) -> None:
    assert migrate.current(empty_database_url) is None
    assert migrate.upgrade(empty_database_url) == migrate.newest()
    assert tables(empty_database_url) == {*Base.metadata.tables, "alembic_version"}
    assert migrate.downgrade(empty_database_url) is None
    assert tables(empty_database_url) == {"alembic_version"}
    assert migrate.upgrade(empty_database_url) == migrate.newest()
    assert migrate.current(empty_database_url) == migrate.newest()


def test_every_revision_goes_down_and_up(empty_database_url: str) -> None:
    revisions = [script.revision for script in migrate.scripts().walk_revisions()]
    for revision in reversed(revisions):
        migrate.upgrade(empty_database_url, revision)
    for revision in revisions:
        migrate.downgrade(empty_database_url, "-1")
        assert migrate.current(empty_database_url) != revision
        migrate.upgrade(empty_database_url, revision)
        migrate.downgrade(empty_database_url, "-1")


def test_migrated_schema_equals_the_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_missing_column_would_be_noticed(database: Database) -> None:
    with database.write_connection() as connection:
        connection.execute(text("ALTER TABLE blobs DROP COLUMN size"))
    with database.engine.connect() as connection:
        (difference,) = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert difference[0] == "add_column"


def test_upgrade_is_idempotent_and_keeps_rows(database_url: str, database: Database) -> None:
    with database.write_connection() as connection:
        connection.execute(
            text("INSERT INTO blobs VALUES ('default', 'aa', 3, :at)"), {"at": "2026-11-20 00:00:00+00:00"}
        )
    migrate.upgrade(database_url)
    with database.engine.connect() as connection:
        assert connection.execute(text("SELECT size FROM blobs")).scalar_one() == 3


def test_processes_that_race_migrate_once(empty_database_url: str) -> None:
    reached: list[str] = []
    threads = [
        threading.Thread(target=lambda: reached.append(migrate.upgrade(empty_database_url))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reached == [migrate.newest()] * 4


def test_a_newer_database_is_refused_with_its_version(database_url: str, database: Database) -> None:
    with database.write_connection() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    words = re.escape("Got 9999. Install the Bitplan that made schema version 9999, or newer.")
    for action in (
        lambda: migrate.upgrade(database_url),
        lambda: migrate.downgrade(database_url),
        lambda: migrate.check(database),
    ):
        with pytest.raises(migrate.DatabaseTooNew, match=words):
            action()


def test_an_unmigrated_database_is_not_ready(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    with pytest.raises(migrate.DatabaseNotReady, match="Got an empty database"):
        migrate.check(database)
    migrate.upgrade(empty_database_url)
    migrate.check(database)
    database.close()


def test_migrations_are_found_beside_the_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "service"
    (package / "migrations").mkdir(parents=True)
    (package / "db").mkdir()
    monkeypatch.setattr(migrate, "__file__", str(package / "db" / "migrate.py"))
    with pytest.raises(FileNotFoundError, match="Install Bitplan again"):
        migrate.migrations_folder()
    (package / "migrations" / "env.py").touch()
    assert migrate.migrations_folder() == package / "migrations"
