from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from service.db.engine import Database
from service.db.repositories import events, jobs, leases
from service.db.repositories.jobs import JobNotFinished
from service.db.repositories.leases import LeaseLost, Owner
from service.records import Cursor, JobRecord
from service.states import (
    TERMINAL,
    TRANSITIONS,
    IllegalTransition,
    JobKind,
    JobState,
    Stage,
    check_transition,
)

OWNER = Owner("one", "host", 1, "boot/1")
OTHER = Owner("two", "host", 2, "boot/2")
FAR = 3600.0
EXPIRED = -1.0


def create(database: Database, kind: JobKind = JobKind.SEARCH, tenant: str = "default") -> JobRecord:
    with database.write() as session:
        return jobs.create(session, kind=kind, request={"a": 1}, request_digest="d", tenant=tenant)


def claim(database: Database, owner: Owner = OWNER, lease: float = FAR) -> JobRecord | None:
    with database.write() as session:
        return leases.claim(session, owner, lease)


def claimed(database: Database, lease: float = FAR) -> JobRecord:
    create(database)
    job = claim(database, lease=lease)
    assert job is not None
    return job


def finish(database: Database, job: JobRecord, state: JobState = JobState.SUCCEEDED) -> JobRecord:
    with database.write() as session:
        return leases.finish(session, job.id, job.epoch, state, summary={"x": 1})


def current(database: Database, job_id: str) -> JobRecord:
    with database.read() as session:
        job = jobs.get(session, job_id)
    assert job is not None
    return job


def history(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        found = events.list_after(session, job_id)
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    return [event.type for event in found]


def test_a_job_is_born_queued(database: Database) -> None:
    job = create(database)
    assert (job.state, job.epoch, job.version, job.request) == (JobState.QUEUED, 0, 1, {"a": 1})
    assert job.id.startswith("job_")
    assert current(database, job.id) == job
    assert history(database, job.id) == ["queued"]


def test_other_tenants_see_nothing(database: Database) -> None:
    job = create(database, tenant="one")
    with database.read() as session:
        assert jobs.get(session, job.id, tenant="two") is None
        assert jobs.get(session, job.id, tenant="one") == job
        assert jobs.list_page(session, tenant="two") == ()


def test_pages_are_complete_and_newest_first(database: Database) -> None:
    made = [create(database).id for _ in range(7)]
    seen: list[str] = []
    after: Cursor | None = None
    with database.read() as session:
        while page := jobs.list_page(session, limit=3, after=after):
            seen += [job.id for job in page]
            after = Cursor(page[-1].created_at, page[-1].id)
    assert seen == made[::-1]


@pytest.mark.parametrize("limit", [0, 201])
def test_pages_have_bounds(database: Database, limit: int) -> None:
    with database.read() as session, pytest.raises(ValueError, match="limit must be between 1 and 200"):
        jobs.list_page(session, limit=limit)


def test_pages_filter_by_state_and_kind(database: Database) -> None:
    queued, other = create(database), create(database, JobKind.VERIFY_MODEL)
    with database.read() as session:
        assert jobs.list_page(session, kind=JobKind.VERIFY_MODEL) == (other,)
        assert jobs.list_page(session, state=JobState.RUNNING) == ()
        assert len(jobs.list_page(session, state=JobState.QUEUED)) == 2
        assert jobs.find_by_request(session, "d", frozenset({JobState.QUEUED})) == other
        assert jobs.find_by_request(session, "e", frozenset({JobState.QUEUED})) is None
    assert queued.kind == JobKind.SEARCH


def test_of_the_jobs_about_another_the_newest_that_succeeded_is_found(database: Database) -> None:
    def ask(job: str, state: JobState | None, kind: JobKind = JobKind.CORRELATE) -> JobRecord:
        with database.write() as session:
            made = jobs.create(session, kind=kind, request={"job": job}, request_digest="d")
            if state is None:
                return made
            held = leases.claim_job(session, made.id, OWNER, FAR)
            assert held is not None
            return leases.finish(session, made.id, held.epoch, state)

    def found(job: str) -> JobRecord | None:
        with database.read() as session:
            return jobs.newest_about(session, JobKind.CORRELATE, job)

    ask("a", None, JobKind.MEASURE_PLAN)
    assert found("a") is None
    ask("a", JobState.FAILED)
    waiting = ask("a", None)
    assert found("a") == waiting
    succeeded = [ask("a", JobState.SUCCEEDED) for _ in range(2)]
    ask("a", JobState.FAILED)
    ask("b", JobState.SUCCEEDED)
    assert found("a") == succeeded[1]


def test_standings_and_new_events_of_many_jobs_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PER_QUERY", 2)
    monkeypatch.setattr(events, "PER_QUERY", 2)
    made = [create(database) for _ in range(5)]
    held = claim(database)
    assert held is not None
    with database.write() as session:
        leases.progress(session, held.id, held.epoch, stage=Stage.SCORING, done=3, total=7)
    ids = [job.id for job in made]
    with database.read() as session:
        found = jobs.standings(session, [*ids, "job_unknown"])
        news = events.list_of(session, {ids[0]: 1, ids[1]: 0, ids[2]: 1, "job_unknown": 0})
    assert sorted(found) == sorted(ids)
    first, second = found[held.id], found[ids[1]]
    assert (first.state, first.stage, first.done, first.total, first.seq) == ("running", "scoring", 3, 7, 3)
    assert (second.state, second.stage, second.seq, second.finished) == ("queued", None, 1, False)
    assert first.version > second.version
    assert {job: [event.seq for event in listed] for job, listed in news.items()} == {
        ids[0]: [2, 3],
        ids[1]: [1],
    }


def test_the_oldest_is_claimed_first_and_once(database: Database) -> None:
    first, second = create(database), create(database)
    one, two = claim(database), claim(database, OTHER)
    assert one is not None
    assert two is not None
    assert (one.id, one.state, one.epoch, one.lease_owner) == (first.id, JobState.RUNNING, 1, "one")
    assert (two.id, two.lease_pid, two.lease_process) == (second.id, 2, "boot/2")
    assert one.started_at is not None
    assert claim(database) is None


def test_claims_may_be_limited_to_kinds(database: Database) -> None:
    create(database, JobKind.VERIFY_MODEL)
    with database.write() as session:
        assert leases.claim(session, OWNER, FAR, [JobKind.SEARCH]) is None
        assert leases.claim(session, OWNER, FAR, [JobKind.VERIFY_MODEL]) is not None


def test_one_job_can_be_claimed_by_name(database: Database) -> None:
    create(database)
    wanted = create(database)
    with database.write() as session:
        job = leases.claim_job(session, wanted.id, OWNER, FAR)
        assert job is not None
        assert job.id == wanted.id
        assert leases.claim_job(session, wanted.id, OTHER, FAR) is None


def test_an_expired_lease_is_claimed_with_the_next_epoch(database: Database) -> None:
    job = claimed(database, lease=EXPIRED)
    again = claim(database, OTHER)
    assert again is not None
    assert (again.id, again.epoch, again.state) == (job.id, 2, JobState.RUNNING)
    assert again.started_at == job.started_at
    assert history(database, job.id) == ["queued", "running", "reclaimed"]


Write = Callable[[JobRecord], Callable[..., object]]
FENCED: dict[str, Callable[..., object]] = {
    "hold": lambda session, job: leases.hold(session, job.id, job.epoch),
    "heartbeat": lambda session, job: leases.heartbeat(session, job.id, job.epoch, FAR),
    "release": lambda session, job: leases.release(session, job.id, job.epoch),
    "progress": lambda session, job: leases.progress(
        session, job.id, job.epoch, stage=Stage.SCORING, done=1, total=2
    ),
    "set_score_set": lambda session, job: leases.set_score_set(session, job.id, job.epoch, "x"),
    "finish": lambda session, job: leases.finish(session, job.id, job.epoch, JobState.SUCCEEDED),
}


@pytest.mark.parametrize("name", FENCED)
def test_a_runner_that_lost_its_lease_changes_nothing(database: Database, name: str) -> None:
    old = claimed(database, lease=EXPIRED)
    claim(database, OTHER)
    before = current(database, old.id)
    with pytest.raises(LeaseLost, match="Got epoch 2, state running"), database.write() as session:
        FENCED[name](session, old)
    assert current(database, old.id) == before


@pytest.mark.parametrize("name", FENCED)
@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_finished_job_never_changes(database: Database, name: str, state: JobState) -> None:
    job = claimed(database)
    finish(database, job, state)
    before = current(database, job.id)
    with pytest.raises(LeaseLost), database.write() as session:
        FENCED[name](session, job)
    assert current(database, job.id) == before
    assert [kind for kind in history(database, job.id) if kind in TERMINAL] == [state]


@pytest.mark.parametrize("name", FENCED)
def test_a_deleted_job_is_lost(database: Database, name: str) -> None:
    job = claimed(database)
    finish(database, job)
    with database.write() as session:
        jobs.delete(session, job.id)
    with pytest.raises(LeaseLost, match="deleted"), database.write() as session:
        FENCED[name](session, job)


def test_heartbeats_extend_the_lease(database: Database) -> None:
    job = claimed(database, lease=1)
    assert job.lease_expires_at is not None
    with database.write() as session:
        later = leases.heartbeat(session, job.id, job.epoch, FAR)
    assert later.lease_expires_at is not None
    assert later.lease_expires_at > job.lease_expires_at + 1000
    assert later.version == job.version


def test_release_queues_at_once(database: Database) -> None:
    job = claimed(database)
    with database.write() as session:
        released = leases.release(session, job.id, job.epoch)
    assert (released.state, released.lease_owner, released.lease_expires_at) == (JobState.QUEUED, None, None)
    again = claim(database, OTHER)
    assert again is not None
    assert again.epoch == 2
    assert history(database, job.id) == ["queued", "running", "queued", "running"]


def test_progress_grows_the_version_and_tells_stages(database: Database) -> None:
    job = claimed(database)
    for done in (1, 2):
        with database.write() as session:
            now = leases.progress(
                session, job.id, job.epoch, stage=Stage.SCORING, done=done, total=2, eta_seconds=1.5
            )
    assert (now.stage, now.done, now.total, now.eta_seconds) == (Stage.SCORING, 2, 2, 1.5)
    assert now.version == job.version + 2
    assert history(database, job.id) == ["queued", "running", "stage"]


def test_success_and_failure_keep_their_story(database: Database) -> None:
    job = claimed(database)
    done = finish(database, job)
    assert (done.state, done.summary, done.lease_owner, done.finished) == (
        JobState.SUCCEEDED,
        {"x": 1},
        None,
        True,
    )
    assert done.finished_at is not None
    other = claimed(database)
    with database.write() as session:
        failed = leases.finish(session, other.id, other.epoch, JobState.FAILED, problem={"detail": "no"})
    assert (failed.state, failed.problem) == (JobState.FAILED, {"detail": "no"})
    with database.read() as session:
        assert events.list_after(session, other.id, 2)[0].data == {"problem": {"detail": "no"}}


def test_a_job_cannot_end_in_a_state_that_is_not_final(database: Database) -> None:
    job = claimed(database)
    with pytest.raises(ValueError, match="must end in a final state"), database.write() as session:
        leases.finish(session, job.id, job.epoch, JobState.QUEUED)


def cancel(database: Database, job: JobRecord) -> JobRecord:
    with database.write() as session:
        return jobs.request_cancel(session, job.id)


def test_a_queued_job_is_cancelled_at_once(database: Database) -> None:
    job = create(database)
    cancelled = cancel(database, job)
    assert cancelled.state == JobState.CANCELLED
    assert cancelled.cancel_requested
    assert history(database, job.id) == ["queued", "cancelling", "cancelled"]
    assert claim(database) is None


def test_a_running_job_is_cancelled_by_its_runner(database: Database) -> None:
    job = claimed(database)
    assert cancel(database, job).state == JobState.CANCELLING
    assert cancel(database, job).state == JobState.CANCELLING
    with database.write() as session:
        assert leases.heartbeat(session, job.id, job.epoch, FAR).state == JobState.CANCELLING
    assert finish(database, job, JobState.SUCCEEDED).state == JobState.CANCELLED
    assert history(database, job.id) == ["queued", "running", "cancelling", "cancelled"]


def test_a_runner_may_cancel_by_itself(database: Database) -> None:
    job = claimed(database)
    assert finish(database, job, JobState.CANCELLED).state == JobState.CANCELLED
    assert history(database, job.id) == ["queued", "running", "cancelling", "cancelled"]


def test_releasing_a_job_that_is_being_cancelled_cancels_it(database: Database) -> None:
    job = claimed(database)
    cancel(database, job)
    with database.write() as session:
        assert leases.release(session, job.id, job.epoch).state == JobState.CANCELLED


def test_cancelling_a_job_whose_runner_is_gone_ends_it(database: Database) -> None:
    job = claimed(database, lease=EXPIRED)
    assert cancel(database, job).state == JobState.CANCELLED


def test_a_cancelling_job_whose_lease_expires_comes_to_another_runner(database: Database) -> None:
    job = claimed(database, lease=FAR)
    cancel(database, job)
    with database.write() as session:
        leases.heartbeat(session, job.id, job.epoch, EXPIRED)
    again = claim(database, OTHER)
    assert again is not None
    assert again.state == JobState.CANCELLING
    assert finish(database, again).state == JobState.CANCELLED


def test_a_finished_job_cannot_be_cancelled(database: Database) -> None:
    job = claimed(database)
    finish(database, job)
    with pytest.raises(IllegalTransition, match=r"the state is final\. Got cancelling"):
        cancel(database, job)


def test_only_finished_jobs_are_deleted(database: Database) -> None:
    job = claimed(database)
    with pytest.raises(JobNotFinished, match=r"Got running\. Cancel it first"), database.write() as session:
        jobs.delete(session, job.id)
    finish(database, job)
    with database.write() as session:
        jobs.delete(session, job.id)
    with database.read() as session:
        assert jobs.get(session, job.id) is None
        assert events.list_after(session, job.id) == ()


def test_unknown_jobs_are_named(database: Database) -> None:
    with pytest.raises(LookupError, match="Got job_x"), database.write() as session:
        jobs.request_cancel(session, "job_x")


def test_a_second_terminal_event_is_impossible(database: Database) -> None:
    job = claimed(database)
    finish(database, job)
    with pytest.raises(IntegrityError), database.write() as session:
        events.append(session, job.id, "failed")


def test_leases_of_dead_processes_are_taken_back(database: Database) -> None:
    held, cancelling, alive = claimed(database), claimed(database), claimed(database)
    cancel(database, cancelling)
    with database.read() as session:
        found = leases.held_on(session, "host")
        assert leases.held_on(session, "elsewhere") == ()
    assert {job.id for job in found} == {held.id, cancelling.id, alive.id}
    dead = [job for job in found if job.id != alive.id]
    with database.write() as session:
        assert leases.take_back(session, dead) == 2
        assert leases.take_back(session, dead) == 0
    assert current(database, held.id).state == JobState.QUEUED
    assert current(database, cancelling.id).state == JobState.CANCELLED
    assert current(database, alive.id).state == JobState.RUNNING
    with pytest.raises(LeaseLost), database.write() as session:
        leases.hold(session, held.id, held.epoch)


def test_taking_back_spares_a_lease_that_was_claimed_meanwhile(database: Database) -> None:
    job = claimed(database, lease=EXPIRED)
    with database.read() as session:
        judged = leases.held_on(session, "host")
    claim(database, OTHER)
    with database.write() as session:
        assert leases.take_back(session, judged) == 0
    assert current(database, job.id).lease_owner == "two"


def test_the_table_of_transitions_is_whole() -> None:
    assert set(TRANSITIONS) == set(JobState)
    for state in JobState:
        assert (not TRANSITIONS[state]) == (state in TERMINAL)
    for old in JobState:
        for new in JobState:
            if new not in TRANSITIONS[old]:
                with pytest.raises(IllegalTransition):
                    check_transition("job_1", old, new)


PROBLEM = {"type": "urn:bitplan:problem:deadline-passed"}


def create_until(database: Database, seconds: float) -> JobRecord:
    """A job with a deadline so many seconds from now."""
    deadline = datetime.now(UTC) + timedelta(seconds=seconds)
    with database.write() as session:
        return jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d", deadline=deadline)


def expire(database: Database) -> list[str]:
    with database.write() as session:
        return [job.id for job in leases.expire(session, PROBLEM)]


def test_a_job_that_waits_past_its_deadline_expires_once(database: Database) -> None:
    late, _, _ = create_until(database, -5), create_until(database, 600), create(database)
    assert expire(database) == [late.id]
    assert expire(database) == []
    ended = current(database, late.id)
    assert (ended.state, ended.problem, ended.finished) == (JobState.EXPIRED, PROBLEM, True)
    assert history(database, late.id) == ["queued", "expired"]


def test_a_job_expires_whose_runner_is_lost_but_not_one_that_is_held(database: Database) -> None:
    late = create_until(database, -5)
    assert claim(database) is not None
    assert expire(database) == []
    held = create_until(database, -5)
    assert claim(database, lease=EXPIRED) is not None
    assert expire(database) == [held.id]
    assert current(database, held.id).lease_owner is None
    assert current(database, late.id).state == JobState.RUNNING


def test_a_job_that_is_being_cancelled_does_not_expire(database: Database) -> None:
    job = create_until(database, -5)
    assert claim(database) is not None
    with database.write() as session:
        jobs.request_cancel(session, job.id)
        leases.locked(session, job.id).lease_expires_at = 1.0
    assert expire(database) == []
