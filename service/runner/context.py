"""What the handler of a job works with."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sensitivity.spec import SessionSpec
from service.db.engine import Database
from service.db.repositories import events, jobs, leases, retention, score_sets
from service.db.repositories.leases import LeaseLost
from service.executors.isolation import isolation_of
from service.executors.protocol import Executor, ExecutorSettings
from service.executors.ray_settings import ray_of
from service.passing import passing
from service.records import JobRecord
from service.runner.problems import JobFailed
from service.runner.signals import Cancelled, DeadlinePassed, ShuttingDown
from service.settings import Settings
from service.states import JobState, Stage
from service.store.blobs import BlobStore

__all__ = ["JobContext", "JobFailed", "MakeExecutor", "Progress"]

T = TypeVar("T")
MakeExecutor = Callable[[ExecutorSettings], Executor]
PROGRESS_SECONDS = 1.0
LOOK_SECONDS = 1.0
WRITE_TRIES = 6

log = structlog.get_logger()


@dataclass(frozen=True)
class Progress:
    """How far a job is: `done` of `total` in `stage`; `eta_seconds` is None until it can be guessed."""

    stage: Stage
    done: int
    total: int
    eta_seconds: float | None


class JobContext:
    """One claimed job in the hands of its handler.

    job             the record as it was claimed
    epoch           of this claim; every write is fenced by it
    settings, database, store    of this runner; `store` holds the blobs of the job's tenant

    A handler calls `check` often (at least every few seconds) and lets `Cancelled`, `DeadlinePassed`,
    `ShuttingDown` and `LeaseLost` pass. It may return a summary; raising a `ServiceError` ends the job as
    failed with that problem. It must be able to begin again from what is stored: a job may be claimed many
    times.
    """

    def __init__(
        self,
        job: JobRecord,
        *,
        settings: Settings,
        database: Database,
        make_executor: MakeExecutor,
        stop: threading.Event,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.job, self.epoch = job, job.epoch
        self.settings, self.database = settings, database
        self.store = BlobStore(settings.data_dir, job.tenant)
        self._make_executor = make_executor
        self._stop, self._on_progress = stop, on_progress
        self._cancelled = threading.Event()
        self._lost: LeaseLost | None = None
        self._gaps: SimpleQueue[tuple[str, ...]] = SimpleQueue()
        self._told_gaps: set[tuple[str, ...]] = set()
        self._pace = _Pace()
        self._last_look = time.monotonic()
        self._held_until = time.monotonic() + settings.lease_seconds
        self._ends_by = time.monotonic() + _seconds_left(job, settings.lease_seconds)

    def executor(
        self,
        spec: SessionSpec,
        session_factory: str | None = None,
        workers: int | None = None,
        writable: tuple[Path, ...] = (),
    ) -> Executor:
        """An executor for sessions of `spec`; its workers start with the first unit. The caller closes it.

        `session_factory` ("package.module:callable") and `workers` replace those of the settings; workers may
        write into the `writable` folders of the data directory.
        """
        settings = self.settings
        factory = session_factory or settings.session_factory
        isolation = isolation_of(settings)
        opened = tuple(str(folder.resolve()) for folder in writable)
        made = self._make_executor(
            ExecutorSettings(
                workers or settings.workers,
                settings.data_dir / "logs",
                factory,
                replace(isolation, writable=opened),
                self._gaps.put,
                ray_of(settings),
            )
        )
        made.start(spec)
        return made

    def write(self, change: Callable[[Session], T]) -> T:
        """Run `change(session)` in one transaction that commits only if this claim still holds the job.

        A database that is busy or away for a moment is tried again, so `change` may run more than once; it
        must do nothing but talk to its session. Raises `LeaseLost`.
        """
        return self._again(lambda: self._write_once(change))

    def read(self, query: Callable[[Session], T]) -> T:
        """Run `query(session)` in a read transaction, with the same patience."""
        return self._again(lambda: self._read_once(query))

    def check(self) -> None:
        """Raise `Cancelled`, `DeadlinePassed`, `ShuttingDown` or `LeaseLost` when the handler must stop.
        Cheap: call it often.
        """
        if self._lost is not None:
            raise self._lost
        now = time.monotonic()
        if now > self._held_until:
            raise LeaseLost(self.job.id, self.epoch, "no heartbeat for the length of a lease")
        if now - self._last_look > LOOK_SECONDS:
            self._last_look = now
            self._look()
        if self._cancelled.is_set():
            raise Cancelled(self.job.id)
        if now > self._ends_by:
            raise DeadlinePassed(self.job.id)
        if self._stop.is_set():
            raise ShuttingDown(self.job.id)

    def wait(self, seconds: float) -> None:
        """Sleep, but leave as `check` does."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            self._stop.wait(min(left, 0.1))
        self.check()

    def report_progress(self, stage: Stage, done: int, total: int) -> None:
        """Say how far the job is; written at most once a second, and whenever a stage begins or ends."""
        progress, due = self._pace.take(Progress(stage, done, total, None))
        if not due:
            return
        self.write(
            lambda session: leases.progress(
                session,
                self.job.id,
                self.epoch,
                stage=stage,
                done=done,
                total=total,
                eta_seconds=progress.eta_seconds,
            )
        )
        if self._on_progress is not None:
            self._on_progress(progress)

    def event(self, type_: str, data: Mapping[str, Any]) -> None:
        """Add an event to the job's list."""
        self.write(lambda session: events.append(session, self.job.id, type_, data))

    def tell_gaps(self) -> None:
        """An event for what workers of this job are not kept from, once for each such answer of theirs."""
        while not self._gaps.empty():
            gaps = self._gaps.get()
            if gaps not in self._told_gaps:
                self._told_gaps.add(gaps)
                log.warning("worker.not_isolated", gaps=gaps)
                self.event("isolation", {"gaps": list(gaps)})

    def open_score_set(self, digest: str, score_settings: Mapping[str, Any]) -> None:
        """Make sure that the score set exists, and say that this job fills it."""

        def change(session: Session) -> None:
            retention.share(session)
            score_sets.ensure(session, digest, score_settings, tenant=self.job.tenant)
            leases.set_score_set(session, self.job.id, self.epoch, digest)

        self.write(change)

    def heartbeat(self) -> None:
        """Extend the lease; called by the heartbeat thread."""
        began = time.monotonic()
        try:
            with self.database.write() as session:
                job = leases.heartbeat(session, self.job.id, self.epoch, self.settings.lease_seconds)
        except LeaseLost as lost:
            self._lost = lost
            raise
        self._held_until = began + self.settings.lease_seconds
        self._notice(job)

    def _write_once(self, change: Callable[[Session], T]) -> T:
        try:
            with self.database.write() as session:
                job = leases.hold(session, self.job.id, self.epoch)
                result = change(session)
        except LeaseLost as lost:
            self._lost = lost
            raise
        self._notice(job)
        return result

    def _read_once(self, query: Callable[[Session], T]) -> T:
        with self.database.read() as session:
            return query(session)

    def _again(self, action: Callable[[], T]) -> T:
        for attempt in range(WRITE_TRIES):
            try:
                return action()
            except DBAPIError as error:
                if not passing(error) or attempt == WRITE_TRIES - 1:
                    raise
                log.warning("database.try_again", attempt=attempt + 1, error=str(error.orig))
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("the loop returns or raises")

    def _look(self) -> None:
        job = self.read(lambda session: jobs.get(session, self.job.id))
        if job is None or job.epoch != self.epoch or job.finished:
            found = "a job that was deleted" if job is None else f"epoch {job.epoch}, state {job.state}"
            self._lost = LeaseLost(self.job.id, self.epoch, found)
            raise self._lost
        self._notice(job)

    def _notice(self, job: JobRecord) -> None:
        if job.state == JobState.CANCELLING:
            self._cancelled.set()


def _seconds_left(job: JobRecord, lease_seconds: float) -> float:
    """How long a job that was just claimed may run, by the clock that its lease was given by."""
    if job.deadline_at is None or job.lease_expires_at is None:
        return math.inf
    return job.deadline_at - (job.lease_expires_at - lease_seconds)


class _Pace:
    """Decides when progress is worth a write, and guesses the time left from the pace of the stage."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._began = self._written = 0.0
        self._base = 0

    def take(self, progress: Progress) -> tuple[Progress, bool]:
        """The progress with its guess, and whether it is due."""
        now = time.monotonic()
        fresh = progress.stage != self._stage
        if fresh:
            self._stage, self._began, self._base = progress.stage, now, progress.done
        due = fresh or progress.done >= progress.total or now - self._written >= PROGRESS_SECONDS
        if due:
            self._written = now
        return Progress(progress.stage, progress.done, progress.total, self._eta(progress, now)), due

    def _eta(self, progress: Progress, now: float) -> float | None:
        gained, left = progress.done - self._base, progress.total - progress.done
        return (now - self._began) / gained * left if gained > 0 and left >= 0 else None
