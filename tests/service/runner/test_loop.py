import errno
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.db.engine import Database
from service.db.repositories import events, jobs, leases
from service.db.repositories.leases import LeaseLost, Owner
from service.errors import Unprocessable
from service.executors.protocol import ExecutorAway
from service.records import JobRecord
from service.runner import loop
from service.runner.context import JobContext, Progress
from service.runner.identity import host_name
from service.runner.loop import Handler, Runner
from service.settings import Settings
from service.states import JobKind, JobState, Stage

NewJob = Callable[..., JobRecord]
Current = Callable[[JobRecord], JobRecord]
PATIENCE_SECONDS = 20


@pytest.fixture
def runner(settings: Settings, database: Database) -> Callable[[Handler], Runner]:
    return lambda handler: Runner(settings, database, {JobKind.SEARCH: handler})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def history(database: Database, job: JobRecord) -> list[str]:
    with database.read() as session:
        return [event.type for event in events.list_after(session, job.id)]


def test_a_job_succeeds_with_its_summary(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    job = new_job()
    done = runner(lambda context: {"answer": 42}).run_one()
    assert done is not None
    assert (done.id, done.state, done.summary) == (job.id, JobState.SUCCEEDED, {"answer": 42})
    assert history(database, job) == ["queued", "running", "succeeded"]


def test_nothing_to_do(runner: Callable[[Handler], Runner], new_job: NewJob) -> None:
    assert runner(lambda context: None).run_one() is None
    new_job(JobKind.VERIFY_MODEL)
    assert runner(lambda context: None).run_one() is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_gives_the_job_back_until_it_passes(
    number: int, runner: Callable[[Handler], Runner], new_job: NewJob, database: Database, current: Current
) -> None:
    tries: list[int] = []

    def handler(context: JobContext) -> None:
        tries.append(context.epoch)
        if len(tries) < 3:
            raise OSError(number, "no")

    job = new_job()
    serving = runner(handler)
    thread = threading.Thread(target=serving.run)
    thread.start()
    wait_for(lambda: current(job).finished)
    serving.stop()
    thread.join()
    assert current(job).state == JobState.SUCCEEDED
    assert history(database, job) == ["queued", "running"] * 3 + ["succeeded"]


def test_another_error_of_the_system_fails_the_job(
    runner: Callable[[Handler], Runner], new_job: NewJob
) -> None:
    def handler(context: JobContext) -> None:
        raise PermissionError(errno.EACCES, "no")

    new_job()
    done = runner(handler).run_one()
    assert done is not None
    assert (done.state, "PermissionError" in str(done.problem)) == (JobState.FAILED, True)


def test_a_problem_fails_the_job_with_its_document(
    runner: Callable[[Handler], Runner], new_job: NewJob
) -> None:
    def handler(context: JobContext) -> None:
        raise Unprocessable("bad-model", "The model must load. Got none.", extra={"layer": "a"})

    new_job()
    done = runner(handler).run_one()
    assert done is not None
    assert done.state == JobState.FAILED
    assert done.problem == {
        "type": "urn:bitplan:problem:bad-model",
        "title": "Unprocessable",
        "status": 422,
        "detail": "The model must load. Got none.",
        "layer": "a",
    }


def test_an_unexpected_error_fails_the_job_by_its_name(
    runner: Callable[[Handler], Runner], new_job: NewJob
) -> None:
    def handler(context: JobContext) -> None:
        raise KeyError("surprise")

    new_job()
    done = runner(handler).run_one()
    assert done is not None
    assert done.problem is not None
    assert done.problem["type"].endswith("internal-error")
    assert "KeyError: 'surprise'" in done.problem["detail"]


def test_a_cancelled_job_ends_cancelled(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database, settings: Settings
) -> None:
    def handler(context: JobContext) -> None:
        with database.write() as session:
            jobs.request_cancel(session, context.job.id)
        context.wait(PATIENCE_SECONDS)

    job = new_job()
    done = runner(handler).run_one()
    assert done is not None
    assert done.state == JobState.CANCELLED
    assert history(database, job) == ["queued", "running", "cancelling", "cancelled"]


def due_in(database: Database, seconds: float) -> JobRecord:
    """A job with a deadline so many seconds from now."""
    deadline = datetime.now(UTC) + timedelta(seconds=seconds)
    with database.write() as session:
        return jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d", deadline=deadline)


def test_a_job_is_stopped_at_its_deadline(runner: Callable[[Handler], Runner], database: Database) -> None:
    job = due_in(database, 1.0)
    began = time.monotonic()
    done = runner(lambda context: context.wait(PATIENCE_SECONDS)).run_one()
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert done is not None
    assert done.problem is not None
    assert (done.state, done.problem["type"]) == (JobState.EXPIRED, "urn:bitplan:problem:deadline-passed")
    assert history(database, job) == ["queued", "running", "expired"]


def test_a_job_that_was_not_begun_by_its_deadline_is_not_begun(
    runner: Callable[[Handler], Runner], database: Database, current: Current
) -> None:
    job = due_in(database, -1.0)
    assert runner(lambda context: {"answer": 42}).run_one() is None
    assert current(job).state == JobState.EXPIRED
    assert history(database, job) == ["queued", "expired"]


def test_a_job_that_ends_before_its_deadline_succeeds(
    runner: Callable[[Handler], Runner], database: Database
) -> None:
    due_in(database, 600.0)
    done = runner(lambda context: context.wait(0.05)).run_one()
    assert done is not None
    assert done.state == JobState.SUCCEEDED


def test_a_write_notices_the_cancellation_at_once(new_context: Any, database: Database) -> None:
    context = new_context()
    context.check()
    with database.write() as session:
        jobs.request_cancel(session, context.job.id)
    context.event("note", {})
    with pytest.raises(loop.Cancelled):
        context.check()


def test_a_job_that_ends_while_it_is_cancelled_is_cancelled(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    def handler(context: JobContext) -> Mapping[str, Any]:
        with database.write() as session:
            jobs.request_cancel(session, context.job.id)
        return {"too": "late"}

    new_job()
    done = runner(handler).run_one()
    assert done is not None
    assert (done.state, done.problem) == (JobState.CANCELLED, None)


def test_stopping_gives_the_job_back_at_once(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    job = new_job()
    first = runner(lambda context: context.wait(PATIENCE_SECONDS))
    thread = threading.Thread(target=first.run)
    thread.start()
    wait_for(lambda: "running" in history(database, job))
    first.stop()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert history(database, job) == ["queued", "running", "queued"]
    done = runner(lambda context: {"epoch": context.epoch}).run_one()
    assert done is not None
    assert done.summary == {"epoch": 2}


def test_ctrl_c_gives_the_job_back(
    runner: Callable[[Handler], Runner], new_job: NewJob, current: Current
) -> None:
    def handler(context: JobContext) -> None:
        raise KeyboardInterrupt

    job = new_job()
    with pytest.raises(KeyboardInterrupt):
        runner(handler).run_job(job.id)
    assert current(job).state == JobState.QUEUED


def test_a_runner_that_was_overtaken_writes_nothing(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    def handler(context: JobContext) -> Mapping[str, Any]:
        with database.write() as session:
            leases.heartbeat(session, context.job.id, context.epoch, -1)
            assert leases.claim(session, Owner("other", "elsewhere", 1, "p"), 3600) is not None
        return {"winner": "nobody"}

    new_job()
    left = runner(handler).run_one()
    assert left is not None
    assert (left.state, left.epoch, left.summary) == (JobState.RUNNING, 2, None)


def test_a_lost_lease_stops_every_further_call(new_context: Any, database: Database) -> None:
    context = new_context()
    with database.write() as session:
        leases.heartbeat(session, context.job.id, context.epoch, -1)
        leases.claim(session, Owner("other", "elsewhere", 1, "p"), 3600)
    for _ in range(2):
        with pytest.raises(LeaseLost):
            context.event("note", {})
        with pytest.raises(LeaseLost):
            context.check()
    with pytest.raises(LeaseLost):
        context.heartbeat()


def test_heartbeats_keep_the_lease_while_the_handler_works(
    new_job: NewJob, database: Database, settings: Settings
) -> None:
    quick = settings.model_copy(update={"lease_seconds": 3.0, "heartbeat_seconds": 0.2})

    def handler(context: JobContext) -> Mapping[str, Any]:
        context.wait(4.0)
        with database.write() as session:
            return {"stolen": leases.claim(session, Owner("other", "x", 1, "p"), 1) is not None}

    new_job()
    done = Runner(quick, database, {JobKind.SEARCH: handler}).run_one()
    assert done is not None
    assert (done.state, done.summary) == (JobState.SUCCEEDED, {"stolen": False})


def test_without_heartbeats_the_lease_counts_as_lost(
    new_context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context()
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 61)
    with pytest.raises(LeaseLost, match="no heartbeat"):
        context.check()


def test_progress_is_written_with_its_stage(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    seen: list[Progress] = []

    def handler(context: JobContext) -> None:
        for done in range(101):
            context.report_progress(Stage.SCORING, done, 100)
        context.report_progress(Stage.SOLVING, 0, 1)

    job = new_job()
    done = runner(handler).run_one(on_progress=seen.append)
    assert done is not None
    assert (done.stage, done.done, done.total) == (Stage.SOLVING, 0, 1)
    assert [(progress.stage, progress.done) for progress in seen] == [
        (Stage.SCORING, 0),
        (Stage.SCORING, 100),
        (Stage.SOLVING, 0),
    ]
    assert seen[1].eta_seconds == 0
    assert history(database, job) == ["queued", "running", "stage", "stage", "succeeded"]


def test_run_job_runs_that_job_and_returns_finished_ones(
    runner: Callable[[Handler], Runner], new_job: NewJob, current: Current
) -> None:
    older, wanted = new_job(), new_job()
    one = runner(lambda context: {"n": 1})
    assert one.run_job(wanted.id).state == JobState.SUCCEEDED
    assert current(older).state == JobState.QUEUED
    assert one.run_job(wanted.id).epoch == 1


def test_run_job_waits_for_the_runner_that_holds_it(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    job = new_job()
    with database.write() as session:
        held = leases.claim(session, Owner("other", "elsewhere", 1, "p"), 3600)
    assert held is not None

    def finish() -> None:
        time.sleep(0.2)
        with database.write() as session:
            leases.finish(session, job.id, held.epoch, JobState.SUCCEEDED, summary={"by": "other"})

    threading.Thread(target=finish).start()
    assert runner(lambda context: {"by": "me"}).run_job(job.id).summary == {"by": "other"}


@pytest.mark.parametrize("cancelling", [False, True])
def test_jobs_of_a_dead_process_of_this_host_are_taken_back_at_once(
    runner: Callable[[Handler], Runner],
    new_job: NewJob,
    database: Database,
    current: Current,
    cancelling: bool,
) -> None:
    job = new_job()
    with database.write() as session:
        leases.claim(session, Owner("dead", host_name(), 2**22 + 1, "boot/1"), 3600)
        if cancelling:
            jobs.request_cancel(session, job.id)
    one = runner(lambda context: None)
    assert one.run_one() is None
    thread = threading.Thread(target=one.run)
    thread.start()
    wait_for(lambda: current(job).finished)
    one.stop()
    thread.join(PATIENCE_SECONDS)
    assert current(job).state == (JobState.CANCELLED if cancelling else JobState.SUCCEEDED)


def test_jobs_of_living_processes_and_other_hosts_are_left_alone(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    one = runner(lambda context: None)
    for owner in (one.owner, Owner("far", "elsewhere", 2**22 + 1, "boot/1")):
        new_job()
        with database.write() as session:
            leases.claim(session, owner, 3600)
    assert one.take_back() == 0


def test_a_wake_up_ends_the_pause(
    new_job: NewJob, database: Database, settings: Settings, current: Current
) -> None:
    sleepy = Runner(
        settings.model_copy(update={"poll_seconds": 3600.0}), database, {JobKind.SEARCH: lambda context: None}
    )
    thread = threading.Thread(target=sleepy.run)
    thread.start()
    job = new_job()

    def woken() -> bool:
        sleepy.wake()
        return current(job).finished

    wait_for(woken)
    sleepy.stop()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def lose_runners(database: Database, job: JobRecord, count: int, done: int) -> None:
    """So many runners claim the job, come as far as `done`, and die: every second one is found dead, the
    leases of the others expire.
    """
    for number in range(count):
        with database.write() as session:
            lease = 0.0 if number % 2 else 60.0
            held = leases.claim_job(session, job.id, Owner("dead", "host", 1, "p"), lease)
            assert held is not None
            leases.progress(session, job.id, held.epoch, stage=Stage.SCORING, done=done, total=9)
            if lease:
                leases.take_back(session, [held])


def test_a_job_that_ends_runner_after_runner_fails(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    job = new_job()
    lose_runners(database, job, 2 * loop.MOST_LOST, done=3)
    done = runner(lambda context: {"never": "called"}).run_one()
    assert done is not None
    assert (done.id, done.state, done.summary) == (job.id, JobState.FAILED, None)
    assert done.problem is not None
    assert done.problem["type"].endswith("runner-died")
    assert "lost at 3 of 9 in stage scoring" in done.problem["detail"]


def test_a_job_that_gets_further_may_lose_any_number_of_runners(
    runner: Callable[[Handler], Runner], new_job: NewJob, database: Database
) -> None:
    job = new_job()
    for place in range(3):
        lose_runners(database, job, loop.MOST_LOST - 2, done=place)
    done = runner(lambda context: None).run_one()
    assert done is not None
    assert done.state == JobState.SUCCEEDED


def test_a_job_whose_executor_is_away_is_given_back_and_asked_for_again(
    settings: Settings, database: Database, new_job: NewJob, current: Current
) -> None:
    job, tries = new_job(), []

    def handler(context: JobContext) -> Mapping[str, Any]:
        tries.append(context.epoch)
        if len(tries) < 3:
            raise ExecutorAway("Ray must answer at head:6379.")
        return {"answer": 42}

    runner = Runner(settings, database, {JobKind.SEARCH: handler})
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        wait_for(lambda: current(job).finished)
    finally:
        runner.stop()
        thread.join()
    assert current(job).summary == {"answer": 42}
    assert history(database, job) == [*["queued", "running"] * 3, "succeeded"]
    with database.read() as session:
        given_back = [event.data for event in events.list_after(session, job.id) if event.type == "queued"]
    assert "Ray must answer at head:6379." in str(given_back[1])


def test_in_the_foreground_an_executor_that_is_away_is_told(
    runner: Callable[[Handler], Runner], new_job: NewJob, current: Current
) -> None:
    def handler(context: JobContext) -> Mapping[str, Any]:
        raise ExecutorAway("Ray must answer at head:6379.")

    job = new_job()
    with pytest.raises(ExecutorAway, match="Ray must answer"):
        runner(handler).run_job(job.id)
    assert current(job).state == JobState.QUEUED
