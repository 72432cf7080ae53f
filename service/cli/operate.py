"""Commands for whoever runs a service: what may be deleted, is all well, copies of everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import options
from service.cli.exits import CommandError, exits
from service.cli.output import console, print_json, size
from service.cli.serve import DatabaseUrl, settings_of

if TYPE_CHECKING:
    from service.db.engine import Database
    from service.settings import Settings


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Delete old jobs, logs and uploads, and the files that nothing refers to; runners do so by themselves.

    How long things are kept: BITPLAN_KEEP_JOBS_DAYS (0: for ever), BITPLAN_KEEP_LOGS_DAYS,
    BITPLAN_KEEP_UPLOADS_DAYS, BITPLAN_KEEP_KEYS_DAYS, BITPLAN_UNREFERENCED_HOURS.
    """
    with exits(as_json=as_json, interrupted="what was deleted stays deleted"):
        from dataclasses import asdict

        from rich.table import Table

        from service import logs
        from service.retention import collect

        settings = settings_of(data_dir=data_dir, database_url=database_url)
        logs.configure("warning")
        with _database(settings) as database:
            found = collect(settings, database, dry_run=dry_run)
        if found is None:
            raise CommandError(
                "One process at a time must collect. Got another one at work, a runner perhaps. Try again."
            )
        if as_json:
            print_json({"dry_run": dry_run, "collected": [asdict(item) for item in found]})
            return
        table = Table("", "count", "bytes", title="would be deleted" if dry_run else "deleted")
        for item in found:
            table.add_row(item.what, str(item.count), size(item.bytes) if item.bytes else "")
        console().print(table)


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    """The database of these settings, which must have the schema of this version."""
    from service.db import migrate
    from service.db.engine import Database

    database = Database(settings.database_url)
    try:
        migrate.check(database)
        yield database
    finally:
        database.close()
