"""Commands for whoever runs a service: what may be deleted, is all well, copies of everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import options
from service.cli.exits import CommandError, Exit, exits, leave_with
from service.cli.output import console, print_json, size
from service.cli.serve import DatabaseUrl, settings_of

if TYPE_CHECKING:
    from service.backup import Backup
    from service.db.engine import Database
    from service.settings import Settings

COLORS = {"ok": "green", "warning": "yellow", "failed": "red"}
BackupFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the backup is, or shall be.")]


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


def doctor(
    data_dir: options.DataDir = None, database_url: DatabaseUrl = None, as_json: options.Json = False
) -> None:
    """Look at everything that a service on this machine needs; changes nothing. Exits with 1 if something
    has failed.
    """
    with exits(as_json=as_json):
        from dataclasses import asdict

        from rich.table import Table
        from rich.text import Text

        from service.doctor import examine

        found = examine(settings_of(data_dir=data_dir, database_url=database_url))
        healthy = all(check.state != "failed" for check in found)
        if as_json:
            print_json({"healthy": healthy, "checks": [asdict(check) for check in found]})
        else:
            table = Table("", "", "found", show_header=False)
            for check in found:
                table.add_row(check.name, Text(check.state, COLORS[check.state]), Text(check.detail))
            console().print(table)
    leave_with(Exit.DONE if healthy else Exit.FAILED)


def backup(
    folder: BackupFolder,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Copy database and files into a folder, while the service works; the same folder again copies only what
    is new.
    """
    with exits(as_json=as_json, interrupted="the backup is not complete; take it again"):
        from service.backup import back_up

        made = back_up(settings_of(data_dir=data_dir, database_url=database_url), folder)
        _tell(made, f"{folder} holds", as_json=as_json)


def restore(
    folder: BackupFolder,
    data_dir: options.DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: options.Json = False,
) -> None:
    """Give a backup back into an empty data directory and an empty database, checking every file."""
    with exits(as_json=as_json, interrupted="the data directory is half restored; empty it and begin again"):
        from service import logs
        from service.backup import restore as give_back

        logs.configure("warning")
        settings = settings_of(data_dir=data_dir, database_url=database_url)
        _tell(give_back(settings, folder), f"{settings.data_dir} has", as_json=as_json)


def _tell(made: Backup, where: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json(asdict(made))
        return
    console().print(
        f"{where} the {made.database} database (schema version {made.schema_version}) and {made.blobs} files"
        f" of {size(made.bytes)}, as of {made.at}",
        soft_wrap=True,
    )


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
