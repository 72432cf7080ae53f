"""The runner: claims jobs one after the other, runs their handlers, ends them."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError
from structlog.contextvars import bound_contextvars

from service import metrics
from service.db.engine import Database
from service.db.repositories import jobs, leases
from service.db.repositories.leases import LeaseLost
from service.errors import NotFound, slug_of
from service.executors.catalog import make_executor
from service.executors.protocol import Executor, ExecutorAway, ExecutorSettings
from service.failpoints import failpoint
from service.passing import passing
from service.records import JobRecord
from service.runner.context import JobContext, MakeExecutor, Progress
from service.runner.heartbeat import beating
from service.runner.identity import is_dead, this_process
from service.runner.problems import JobFailed, problem_of
from service.runner.signals import Cancelled, DeadlinePassed, Interruption, ShuttingDown
from service.settings import Settings
from service.states import JobKind, JobState

Handler = Callable[[JobContext], Mapping[str, Any] | None]
OnProgress = Callable[[Progress], None]
LONGEST_PAUSE_SECONDS = 30.0
MOST_LOST = 5
"""Runners that a job may lose in a row at the same point of its work."""
OVERDUE = JobFailed(
    "deadline-passed",
    "A job must end by its deadline. Got one that had not. Its scores are kept: resume it, with a later "
    "deadline or none.",
).as_json()

log = structlog.get_logger()


class Runner:
    """Runs the jobs of the kinds it has handlers for.

    A handler's mapping becomes the job's summary. ``run`` serves until `stop`, ``run_one`` runs at most one
    job, and ``run_job`` runs one particular job in the foreground. `make_executor` replaces the executor
    that the settings name (for tests).
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        handlers: Mapping[JobKind, Handler],
        make_executor: MakeExecutor | None = None,
    ):
        self.settings, self.database = settings, database
        self.owner = this_process()
        self._handlers = handlers
        self._make_executor = make_executor or self._configured_executor
        self._stop = threading.Event()
        self._wake = threading.Event()

    def stop(self) -> None:
        """Ask the runner to give its job back and to leave. Callable from any thread and from signal
        handlers.
        """
        self._stop.set()
        self._wake.set()

    def wake(self) -> None:
        """Look for jobs now instead of at the next poll."""
        self._wake.set()

    def run(self) -> None:
        """Serve until `stop`; a database, a disk or an executor that is away is waited for."""
        pause = self.settings.poll_seconds
        while not self._stop.is_set():
            try:
                self.take_back()
                if self.run_one():
                    pause = self.settings.poll_seconds
                    continue
            except (DBAPIError, OSError) as error:
                if not passing(error):
                    raise
                log.warning("runner.waits", error=str(getattr(error, "orig", error)))
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            except ExecutorAway as away:
                log.warning("runner.executor_away", why=str(away))
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            self._wake.wait(pause)
            self._wake.clear()

    def run_one(self, on_progress: OnProgress | None = None) -> JobRecord | None:
        """Claim the oldest free job and run it; None when there is none."""
        with self.database.write() as session:
            overdue = leases.expire(session, OVERDUE)
            job = leases.claim(
                session,
                self.owner,
                self.settings.lease_seconds,
                self._handlers.keys(),
                self.settings.quota_running,
            )
        for late in overdue:
            log.info("job.finished", job=late.id, state=late.state, problem=slug_of(OVERDUE))
        return None if job is None else self._run_claimed(job, on_progress)

    def run_job(self, job_id: str, on_progress: OnProgress | None = None) -> JobRecord:
        """Run this job in the foreground and give it as it ended; a finished one comes back as it is.

        Waits while another runner holds it. Ctrl-C gives the job back to the queue and raises
        KeyboardInterrupt; an executor that is away does so too and raises `ExecutorAway`.
        """
        while True:
            self.take_back()
            with self.database.write() as session:
                claimed = leases.claim_job(session, job_id, self.owner, self.settings.lease_seconds)
            job = self._run_claimed(claimed, on_progress) if claimed is not None else self._current(job_id)
            if job.finished or self._stop.wait(0 if claimed is not None else self.settings.poll_seconds):
                return job

    def take_back(self) -> int:
        """Free the jobs that dead processes of this host hold; how many there were."""
        with self.database.read() as session:
            held = leases.held_on(session, self.owner.host)
        dead = [job for job in held if is_dead(job.lease_pid, job.lease_process)]
        if not dead:
            return 0
        with self.database.write() as session:
            freed = leases.take_back(session, dead)
        log.info("runner.took_back", jobs=freed)
        return freed

    def _run_claimed(self, job: JobRecord, on_progress: OnProgress | None) -> JobRecord:
        """Run it to its end; every line that is logged meanwhile names the job and its epoch."""
        with bound_contextvars(job=job.id, kind=str(job.kind), epoch=job.epoch):
            began = time.perf_counter()
            ended = self._attempt(job, on_progress)
            state = str(ended.state) if ended.finished else "released"
            metrics.JOB_SECONDS.labels(str(job.kind), state).observe(time.perf_counter() - began)
            return ended

    def _attempt(self, job: JobRecord, on_progress: OnProgress | None) -> JobRecord:
        log.info("job.claimed")
        failpoint("runner.after_claim")
        context = JobContext(
            job,
            settings=self.settings,
            database=self.database,
            make_executor=self._make_executor,
            stop=self._stop,
            on_progress=on_progress,
        )
        try:
            with beating(context.heartbeat, self.settings.heartbeat_seconds):
                self._handle(context)
        except LeaseLost as lost:
            metrics.LEASES_LOST.inc()
            log.warning("job.lease_lost", found=str(lost))
        return self._current(job.id)

    def _handle(self, context: JobContext) -> None:
        """Run the handler and write how the job ended. Raises `LeaseLost`, and KeyboardInterrupt after a
        release.
        """
        try:
            summary = self._call(context)
        except Cancelled:
            self._finish(context, JobState.CANCELLED)
        except DeadlinePassed:
            self._finish(context, JobState.EXPIRED, problem=OVERDUE)
        except ShuttingDown:
            self._release(context)
        except LeaseLost:
            raise
        except ExecutorAway as away:
            self._release(context, f"the executor is away: {away}")
            raise
        except (DBAPIError, OSError) as error:
            if not passing(error):
                self._finish(context, JobState.FAILED, problem=problem_of(error))
                return
            self._release(context, "the database or the disk is away")
            raise
        except Exception as error:
            self._finish(context, JobState.FAILED, problem=problem_of(error))
        except (KeyboardInterrupt, SystemExit):
            self._release(context)
            raise
        else:
            self._finish(context, JobState.SUCCEEDED, summary=summary)

    def _call(self, context: JobContext) -> Mapping[str, Any] | None:
        if context.job.state == JobState.CANCELLING:
            raise Cancelled(context.job.id)
        _require_survivable(context)
        summary = self._handlers[context.job.kind](context)
        failpoint("runner.before_finish")
        return summary

    def _finish(
        self,
        context: JobContext,
        state: JobState,
        *,
        summary: Mapping[str, Any] | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        job = context.write(
            lambda session: leases.finish(
                session, context.job.id, context.epoch, state, summary=summary, problem=problem
            )
        )
        slug = None if job.problem is None else slug_of(job.problem)
        log.info("job.finished", state=job.state, problem=slug)

    def _release(self, context: JobContext, why: str = "the runner stops") -> None:
        context.write(lambda session: leases.release(session, context.job.id, context.epoch, why))
        log.info("job.released")

    def _current(self, job_id: str) -> JobRecord:
        with self.database.read() as session:
            job = jobs.get(session, job_id)
        if job is None:
            raise NotFound("job-not-found", f"A job must exist. Got {job_id}.")
        return job

    def _configured_executor(self, executor_settings: ExecutorSettings) -> Executor:
        return make_executor(self.settings.executor, executor_settings)


def _require_survivable(context: JobContext) -> None:
    """Raise JobFailed for a job that loses one runner after the other without getting further."""
    lost = context.read(lambda session: leases.lost_in_a_row(session, context.job.id))
    if lost >= MOST_LOST:
        job = context.job
        where = (
            f"at {job.done} of {job.total} in stage {job.stage}" if job.stage else "before its first stage"
        )
        raise JobFailed(
            "runner-died",
            f"A job must not end its runners. Got {lost} that were lost {where}. See their logs; ask less,"
            " or give the runner more memory, and resume the job.",
        )


__all__ = ["Handler", "Interruption", "OnProgress", "Runner"]
