"""Bring a database to the schema of this code, and refuse one that is newer."""

# ruff: noqa: N818 - an error is named after what went wrong

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from service.db.engine import Database

UPGRADE_LOCK = 0x6269_7470_6C61_6E00


class DatabaseTooNew(RuntimeError):
    """The database was migrated by a newer Bitplan."""

    def __init__(self, found: str, known: str):
        super().__init__(
            f"The database must be at a schema version that this Bitplan knows (up to {known}). Got {found}. "
            f"Install the Bitplan that made schema version {found}, or newer."
        )
        self.found, self.known = found, known


class DatabaseNotReady(RuntimeError):
    """The database has no schema yet, or an older one."""

    def __init__(self, found: str | None, needed: str):
        super().__init__(
            f"The database must be at schema version {needed}. Got {found or 'an empty database'}. "
            "Run `bitplan serve`, or service.db.migrate.upgrade, first."
        )
        self.found, self.needed = found, needed


def migrations_folder() -> Path:
    """The Alembic scripts: inside the installed package, or at the root of the source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise FileNotFoundError(
        f"Migrations must be in {package / 'migrations'}. Got nothing. Install Bitplan again."
    )


def scripts() -> ScriptDirectory:
    """The known revisions."""
    return ScriptDirectory.from_config(_config())


@cache
def newest() -> str:
    """The schema version of this code; read once."""
    head = scripts().get_current_head()
    assert head is not None
    return head


def upgrade(url: str, revision: str = "head") -> str:
    """Migrate up to `revision` in one transaction and give the version reached; processes that race wait in
    line.

    Raises `DatabaseTooNew`.
    """
    database = Database(url)
    try:
        with database.write_connection() as connection:
            _wait_in_line(connection)
            _refuse_newer(connection)
            command.upgrade(_config(connection), revision)
            return _version(connection) or ""
    finally:
        database.close()


def downgrade(url: str, revision: str = "base") -> str | None:
    """Migrate down to `revision` in one transaction (``base``: drop everything). Raises `DatabaseTooNew`."""
    database = Database(url)
    try:
        with database.write_connection() as connection:
            _wait_in_line(connection)
            _refuse_newer(connection)
            command.downgrade(_config(connection), revision)
            return _version(connection)
    finally:
        database.close()


def current(url: str) -> str | None:
    """The schema version of the database, None when it is empty."""
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            return _version(connection)
    finally:
        database.close()


def check(database: Database) -> None:
    """Raise `DatabaseTooNew` or `DatabaseNotReady` unless the schema is exactly this code's."""
    with database.engine.connect() as connection:
        _refuse_newer(connection)
        found = _version(connection)
    if found != newest():
        raise DatabaseNotReady(found, newest())


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(connection: Connection) -> None:
    found = _version(connection)
    if found is not None and found not in known():
        raise DatabaseTooNew(found, newest())


@cache
def known() -> frozenset[str]:
    """Every schema version that this code can read and bring to its own."""
    return frozenset(script.revision for script in scripts().walk_revisions())


def _wait_in_line(connection: Connection) -> None:
    """SQLite's BEGIN IMMEDIATE has done so already; PostgreSQL takes an advisory lock until the commit."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": UPGRADE_LOCK})
