"""Whether the service can do its work now: what /readyz answers and `bitplan doctor` begins with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from service.db import migrate
from service.db.engine import Database
from service.db.repositories import runners
from service.runner.identity import host_name, is_dead
from service.settings import Settings
from service.store.durable import temporary_file

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `detail` says what was found and, unless it is ok, what to do."""

    name: str
    state: State
    detail: str


def readiness(settings: Settings, database: Database) -> tuple[Check, ...]:
    """Database, schema, store and runners. `detail` names no path and no address: strangers may ask."""
    reached = _guarded("database", lambda: _database(database))
    if reached.state == "failed":
        return (reached, _guarded("store", lambda: _store(settings)))
    return (
        reached,
        _guarded("schema", lambda: _schema(database)),
        _guarded("store", lambda: _store(settings)),
        _guarded("runner", lambda: _runner(settings, database)),
    )


def runner_here(settings: Settings) -> Check:
    """Whether a runner of this host (of this container) lives and has said so within a lease."""
    database = Database(settings.database_url)
    try:
        return _guarded("runner", lambda: _runner_here(settings, database))
    finally:
        database.close()


def alive_seconds(settings: Settings) -> float:
    """A runner that has said nothing for this long is taken for dead: the length of a lease."""
    return settings.lease_seconds


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that cannot be made has failed."""
    try:
        return check()
    except (SQLAlchemyError, OSError, migrate.DatabaseTooNew, migrate.DatabaseNotReady) as error:
        what = _TO_DO.get(name, "See the server's log.")
        return Check(name, "failed", f"{type(error).__name__}. {what}")


_TO_DO = {
    "database": "Start the database, or correct BITPLAN_DATABASE_URL.",
    "schema": "Run `bitplan migrate` with the newest Bitplan of this database.",
    "store": "Make the data directory writable, or correct BITPLAN_DATA_DIR.",
    "runner": "Run `bitplan migrate`.",
}


def _database(database: Database) -> Check:
    with database.read() as session:
        session.execute(text("SELECT 1"))
    return Check("database", "ok", f"{database.engine.dialect.name} answers")


def _schema(database: Database) -> Check:
    migrate.check(database)
    return Check("schema", "ok", f"version {migrate.newest()}")


def _store(settings: Settings) -> Check:
    with temporary_file(settings.data_dir / "tmp") as (_, file):
        file.write(b"ready")
        file.flush()
        os.fsync(file.fileno())
    free, least = free_bytes(settings), settings.least_free_bytes
    said = f"{free / 2**30:.1f} GiB are free"
    if free < least:
        must = f"{least / 2**30:.1f} GiB must be (BITPLAN_LEAST_FREE_BYTES)"
        return Check("store", "failed", f"{said}, {must}. Make room: `bitplan gc`.")
    return Check("store", "ok", f"writable, {said}")


def free_bytes(settings: Settings) -> int:
    """What is left for files on the disk of the store."""
    return shutil.disk_usage(settings.data_dir).free


def _runner(settings: Settings, database: Database) -> Check:
    with database.read() as session:
        known = runners.list_all(session)
    alive = [runner for runner in known if runner.seconds_ago <= alive_seconds(settings)]
    if alive:
        return Check("runner", "ok", f"{len(alive)} alive")
    said = (
        f"the last one was seen {min(runner.seconds_ago for runner in known):.0f} s ago"
        if known
        else "none is known"
    )
    return Check("runner", "warning", f"{said}: jobs wait until `bitplan runner` is started")


def _runner_here(settings: Settings, database: Database) -> Check:
    with database.read() as session:
        known = [runner for runner in runners.list_all(session) if runner.host == host_name()]
    living = [runner for runner in known if not is_dead(runner.pid, runner.process)]
    seen = min((runner.seconds_ago for runner in living), default=None)
    if seen is None:
        return Check("runner", "failed", "A runner must live on this host. Got none. Start `bitplan runner`.")
    least = alive_seconds(settings)
    if seen > least:
        said = f"A runner must say within {least:g} s that it lives. Got one that last did {seen:.0f} s ago."
        return Check("runner", "failed", f"{said} See its log, and whether the database answers.")
    return Check("runner", "ok", f"{len(living)} on this host, seen {seen:.0f} s ago")
