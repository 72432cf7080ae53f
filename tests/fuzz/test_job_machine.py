"""The job machine against a model of a few lines: two runners, late writes, users who cancel and delete."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from sqlalchemy import update

from service.db import migrate
from service.db.engine import Database, database_clock
from service.db.repositories import events, jobs, leases
from service.db.repositories.jobs import JobNotFinished
from service.db.repositories.leases import LeaseLost, Owner
from service.db.tables import JobRow
from service.records import JobRecord
from service.states import TERMINAL, IllegalTransition, JobKind, JobState, Stage
from tests.fuzz.effort import Effort

RUNNERS = [Owner(name, f"host-{name}", 1, f"boot/{name}") for name in ("one", "two")]
ENDS = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]
LEASE = 3600.0


@dataclass
class Expected:
    """What the model knows of one job."""

    state: JobState = JobState.QUEUED
    epoch: int = 0
    expired: bool = False
    predecessor: str | None = None

    @property
    def held(self) -> bool:
        return self.state in (JobState.RUNNING, JobState.CANCELLING)

    @property
    def free(self) -> bool:
        return self.state == JobState.QUEUED or (self.held and self.expired)


class JobMachine(RuleBasedStateMachine):
    """`claims` are (job, epoch) of every claim that was ever made: most of them are of the past."""

    known = Bundle("known")
    claims = Bundle("claims")

    def __init__(self, empty: bytes) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        Path(self.folder.name, "test.db").write_bytes(empty)
        self.database = Database(f"sqlite:///{self.folder.name}/test.db")
        self.jobs: dict[str, Expected] = {}
        self.ended: dict[str, JobRecord] = {}

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    def write(self, change: Callable[..., Any], *values: Any, **named: Any) -> Any:
        with self.database.write() as session:
            return change(session, *values, **named)

    def create(self, predecessor: str | None) -> str:
        job = self.write(
            jobs.create, kind=JobKind.SEARCH, request={}, request_digest="d", predecessor=predecessor
        )
        self.jobs[job.id] = Expected(predecessor=predecessor)
        return str(job.id)

    @initialize(target=known)
    def begin(self) -> str:
        return self.create(None)

    @rule(target=known)
    def submit(self) -> str:
        return self.create(None)

    @rule(target=known, job=known)
    def resume(self, job: str) -> Any:
        expected = self.jobs.get(job)
        return self.create(job) if expected and expected.state in TERMINAL else multiple()

    @rule(target=claims, owner=st.sampled_from(RUNNERS))
    def claim(self, owner: Owner) -> Any:
        """The oldest free job, whoever held it before."""
        free = [ident for ident, expected in self.jobs.items() if expected.free]
        job = self.write(leases.claim, owner, LEASE)
        assert (job is not None) == bool(free)
        if job is None:
            return multiple()
        assert job.id in free
        return self.claimed(job)

    @rule(target=claims, job=known, owner=st.sampled_from(RUNNERS))
    def claim_this(self, job: str, owner: Owner) -> Any:
        found = self.write(leases.claim_job, job, owner, LEASE)
        assert (found is not None) == (job in self.jobs and self.jobs[job].free)
        return multiple() if found is None else self.claimed(found)

    def claimed(self, job: JobRecord) -> tuple[str, int]:
        expected = self.jobs[job.id]
        expected.epoch += 1
        expected.expired = False
        if expected.state == JobState.QUEUED:
            expected.state = JobState.RUNNING
        assert (job.state, job.epoch) == (expected.state, expected.epoch)
        return job.id, job.epoch

    @contextmanager
    def fenced(self, claim: tuple[str, int]) -> Iterator[Expected]:
        """A write of a runner: it happens if the claim is the last one of a held job, else nothing does."""
        expected = self.jobs.get(claim[0])
        current = expected is not None and expected.held and expected.epoch == claim[1]
        try:
            yield expected or Expected()
        except LeaseLost:
            assert not current
        else:
            assert current

    @rule(claim=claims)
    def heartbeat(self, claim: tuple[str, int]) -> None:
        with self.fenced(claim) as expected:
            self.write(leases.heartbeat, *claim, LEASE)
            expected.expired = False

    @rule(claim=claims, stage=st.sampled_from(Stage), done=st.integers(0, 9))
    def progress(self, claim: tuple[str, int], stage: Stage, done: int) -> None:
        with self.fenced(claim):
            self.write(leases.progress, *claim, stage=stage, done=done, total=9)

    @rule(claim=claims, state=st.sampled_from(ENDS))
    def finish(self, claim: tuple[str, int], state: JobState) -> None:
        with self.fenced(claim) as expected:
            job = self.write(leases.finish, *claim, state, problem={"type": "x"})
            expected.state = JobState.CANCELLED if expected.state == JobState.CANCELLING else state
            assert job.state == expected.state

    @rule(claim=claims)
    def give_back(self, claim: tuple[str, int]) -> None:
        with self.fenced(claim) as expected:
            self.write(leases.release, *claim)
            cancelling = expected.state == JobState.CANCELLING
            expected.state = JobState.CANCELLED if cancelling else JobState.QUEUED

    @rule(job=known)
    def expire(self, job: str) -> None:
        """The lease runs out: its runner was paused, or died on another host."""
        if job in self.jobs and self.jobs[job].held:
            past = update(JobRow).where(JobRow.id == job).values(lease_expires_at=database_clock() - 1)
            self.write(lambda session: session.execute(past))
            self.jobs[job].expired = True

    @rule(owner=st.sampled_from(RUNNERS))
    def die(self, owner: Owner) -> None:
        """The runner's host sees that its process has died, and frees its jobs."""
        with self.database.read() as session:
            dead = leases.held_on(session, owner.host)
        assert self.write(leases.take_back, dead) == len(dead)
        for job in dead:
            expected = self.jobs[job.id]
            cancelling = expected.state == JobState.CANCELLING
            expected.state = JobState.CANCELLED if cancelling else JobState.QUEUED
            expected.epoch += 1

    @rule(job=known)
    def cancel(self, job: str) -> None:
        expected = self.jobs.get(job)
        try:
            found = self.write(jobs.request_cancel, job)
        except LookupError:
            assert expected is None
        except IllegalTransition:
            assert expected is not None
            assert expected.state in TERMINAL - {JobState.CANCELLED}
        else:
            assert expected is not None
            if expected.state == JobState.QUEUED or (expected.state == JobState.RUNNING and expected.expired):
                expected.state = JobState.CANCELLED
            elif expected.state == JobState.RUNNING:
                expected.state = JobState.CANCELLING
            assert found.state == expected.state

    @precondition(lambda self: any(expected.state in TERMINAL for expected in self.jobs.values()))
    @rule(job=consumes(known))
    def delete(self, job: str) -> None:
        expected = self.jobs.get(job)
        try:
            self.write(jobs.delete, job)
        except LookupError:
            assert expected is None
        except JobNotFinished:
            assert expected is not None
            assert expected.state not in TERMINAL
        else:
            assert expected is not None
            assert expected.state in TERMINAL
            del self.jobs[job]

    @invariant()
    def rows_are_as_expected(self) -> None:
        with self.database.read() as session:
            rows = {job.id: job for job in jobs.list_page(session, limit=200)}
            assert set(rows) == set(self.jobs)
            for ident, expected in self.jobs.items():
                job = rows[ident]
                assert (job.state, job.epoch) == (expected.state, expected.epoch)
                assert (job.lease_owner is not None) == expected.held
                told = events.list_after(session, ident)
                assert [event.seq for event in told] == list(range(1, len(told) + 1))
                ends = [event.type for event in told if event.type in TERMINAL]
                assert ends == ([expected.state] if expected.state in TERMINAL else [])
                if expected.state in TERMINAL:
                    assert self.ended.setdefault(ident, job) == job


def test_jobs_move_as_the_model_says(effort: Effort, tmp_path: Path) -> None:
    migrate.upgrade(f"sqlite:///{tmp_path / 'empty.db'}")
    empty = (tmp_path / "empty.db").read_bytes()
    effort.check_machine(lambda: JobMachine(empty), few=6)
