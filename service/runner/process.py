"""A runner as a process of its own: ``bitplan runner``."""

import signal
from types import FrameType

import structlog

from service import logs
from service.db import migrate
from service.db.engine import Database
from service.executors.catalog import require_usable
from service.runner.catalog import load_handlers
from service.runner.deliveries import deliveries_of, delivering
from service.runner.loop import Runner
from service.runner.presence import collecting, present
from service.settings import Settings

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Serve jobs until SIGTERM or SIGINT, which give the job in progress back to the queue. Meanwhile be
    known as a runner, deliver webhooks, and collect garbage.

    The database is migrated first. Raises `DatabaseTooNew`, and ValueError for an executor that cannot be
    used.
    """
    require_usable(settings)
    migrate.upgrade(settings.database_url)
    logs.configure(settings.log_level)
    logs.adopt_libraries(settings.log_level)
    database = Database(settings.database_url)
    try:
        runner = Runner(settings, database, load_handlers())
        _stop_on_signals(runner)
        with (
            present(settings, database, runner.owner),
            collecting(settings, database),
            delivering(deliveries_of(settings, database), settings.poll_seconds),
        ):
            log.info("runner.started", host=runner.owner.host, pid=runner.owner.pid)
            runner.run()
        log.info("runner.stopped")
    finally:
        database.close()


def _stop_on_signals(runner: Runner) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        runner.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
