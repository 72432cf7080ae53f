"""What a runner does beside its jobs: it says that it lives, and collects what nothing needs any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import structlog
from sqlalchemy.exc import DBAPIError

from service import metrics
from service.db.engine import Database
from service.db.repositories import runners
from service.db.repositories.leases import Owner
from service.retention import collect
from service.runner.heartbeat import beating
from service.runner.identity import is_dead
from service.settings import Settings

FIRST_COLLECTION_SECONDS = 300.0

log = structlog.get_logger()


@contextmanager
def present(settings: Settings, database: Database, owner: Owner) -> Iterator[None]:
    """Be known as a runner that lives until the block ends, with what it counts."""

    def beat() -> None:
        with database.write() as session:
            runners.beat(session, owner, version("bitplan"), metrics.of_runner())

    _replace_the_dead(database, owner)
    beat()
    with beating(beat, settings.heartbeat_seconds):
        yield
    try:
        with database.write() as session:
            runners.forget(session, [owner.name])
    except DBAPIError as error:
        log.warning("runner.database_away", error=str(error.orig))


def _replace_the_dead(database: Database, owner: Owner) -> None:
    """Forget the runners of this host whose processes have ended."""
    with database.read() as session:
        known = [runner for runner in runners.list_all(session) if runner.host == owner.host]
    dead = [runner.name for runner in known if is_dead(runner.pid, runner.process)]
    if dead:
        with database.write() as session:
            runners.forget(session, dead)


@contextmanager
def collecting(settings: Settings, database: Database) -> Iterator[None]:
    """Collect garbage every `gc_interval_hours` in a thread, until the block ends."""
    done = threading.Event()
    interval = settings.gc_interval_hours * 3600

    def serve() -> None:
        pause = min(FIRST_COLLECTION_SECONDS, interval)
        while not done.wait(pause):
            pause = interval
            try:
                for item in collect(settings, database, stopping=done.is_set) or ():
                    metrics.COLLECTED.labels(item.what).inc(item.count)
                    metrics.COLLECTED_BYTES.labels(item.what).inc(item.bytes)
            except Exception as error:
                log.error("gc.failed", exc_info=error)

    thread = threading.Thread(target=serve, name="retention", daemon=True)
    if interval:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if interval:
            thread.join()
