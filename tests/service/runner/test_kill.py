"""kill -9 of a runner or a worker at every named place: the next runner ends the job with the same rows."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from service.db.engine import Database
from service.db.repositories import events, jobs, scores, units
from service.records import JobRecord
from service.settings import Settings
from service.states import TERMINAL, JobState

TOY = Path(__file__).with_name("toy_runner.py")
ROOT = Path(__file__).parents[3]
KILLED = -signal.SIGKILL
RUNNER_PLACES = (
    "runner.after_claim",
    "runner.before_store:4",
    "runner.artifact_written:4",
    "runner.after_store:4",
    "runner.scoring:6",
    "runner.choosing:1",
    "runner.before_finish",
)
QUICK_PLACES = ("runner.after_store:4", "runner.before_finish")
"""The other places wait for the slow suite."""
WORKER_PLACES = ("worker.before_unit:3", "worker.after_unit:3")
SQLITE = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Start:
    def popen(failpoints: str = "") -> "subprocess.Popen[bytes]":
        paths = [str(ROOT), str(TOY.parents[1] / "executors")]
        variables = {
            **os.environ,
            **settings.model_copy(update={"executor": "local_pool"}).as_environment(),
            "PYTHONPATH": os.pathsep.join(paths),
            "BITPLAN_FAILPOINTS": failpoints,
            "BITPLAN_FAILPOINTS_ONCE": str(tmp_path),
        }
        return subprocess.Popen([sys.executable, str(TOY), str(tmp_path / "notes.txt")], env=variables)

    return popen


def check_rows(database: Database, job: JobRecord) -> JobRecord:
    """The job has succeeded with every row once, one terminal event, and no fault; gives the job."""
    with database.read() as session:
        done = jobs.get(session, job.id)
        story = [event.type for event in events.list_after(session, job.id)]
        assert len(scores.keys(session, "a" * 64)) == 20
        assert len(units.keys(session, "a" * 64)) == 12
        assert units.faults(session, "a" * 64) == ()
    assert done is not None
    assert done.state == JobState.SUCCEEDED
    assert [kind for kind in story if kind in TERMINAL] == ["succeeded"]
    assert done.summary is not None
    assert done.summary["sum"] == pytest.approx(EXPECTED, abs=0, rel=0)
    return done


def expected_sum() -> float:
    import hashlib

    def number(text: str) -> float:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

    names = [(f"l{index}", metric) for index in range(10) for metric in ("gram_output", "output_kl")]
    return sum(number(f"{layer}|w4|{metric}|0") for layer, metric in names)


EXPECTED = expected_sum()


def stored_keys(database: Database) -> frozenset[str]:
    with database.read() as session:
        return units.keys(session, "a" * 64)


def check_restart(
    start: Start, database: Database, measured: Callable[[], list[str]], job: JobRecord
) -> None:
    """A second runner takes over at once, and measures nothing that was stored."""
    stored = stored_keys(database)
    before = Counter(measured()) if stored else Counter()
    assert start().wait(240) == 0
    assert check_rows(database, job).epoch >= 2
    assert not stored & set(Counter(measured()) - before)


@SQLITE
@pytest.mark.parametrize(
    "place",
    [
        place if place in QUICK_PLACES else pytest.param(place, marks=pytest.mark.slow)
        for place in RUNNER_PLACES
    ],
)
def test_a_killed_runner_loses_nothing(
    place: str,
    start: Start,
    database: Database,
    new_job: Callable[[], JobRecord],
    measured: Callable[[], list[str]],
) -> None:
    job = new_job()
    assert start(f"{place}=kill").wait(240) == KILLED
    check_restart(start, database, measured, job)


@pytest.mark.parametrize(
    "empty_database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
@pytest.mark.parametrize("place", ["runner.artifact_written:4", "runner.after_store:4"])
def test_a_killed_runner_loses_nothing_on_postgresql(
    place: str,
    start: Start,
    database: Database,
    new_job: Callable[[], JobRecord],
    measured: Callable[[], list[str]],
) -> None:
    job = new_job()
    assert start(f"{place}=kill").wait(240) == KILLED
    check_restart(start, database, measured, job)


@SQLITE
@pytest.mark.parametrize("place", WORKER_PLACES)
def test_a_killed_worker_is_replaced_by_the_same_runner(
    place: str, start: Start, database: Database, new_job: Callable[[], JobRecord]
) -> None:
    job = new_job()
    assert start(f"{place}=kill").wait(240) == 0
    assert check_rows(database, job).epoch == 1


@pytest.mark.slow
@SQLITE
def test_a_runner_stopped_by_sigstop_past_its_lease_writes_nothing(
    start: Start, database: Database, new_job: Callable[[], JobRecord], settings: Settings
) -> None:
    from service.db.repositories import leases

    job = new_job()
    process = start("runner.scoring:3=sleep:2")
    deadline = time.monotonic() + 30
    while len(stored_keys(database)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    with database.write() as session:
        leases.heartbeat(session, job.id, 1, -1)
        stolen = leases.claim(session, leases.Owner("other", "elsewhere", 1, "p"), 3600)
    assert stolen is not None
    before = stored_keys(database)
    process.send_signal(signal.SIGCONT)
    assert process.wait(240) == 0
    assert stored_keys(database) == before
    with database.write() as session:
        leases.release(session, job.id, stolen.epoch)
    assert start().wait(240) == 0
    assert check_rows(database, job).epoch == 3
