"""Jobs, contexts and executors with fake sessions."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sensitivity.spec import DataSource, ModelSource, SessionSpec
from service.db.engine import Database
from service.db.repositories import jobs, leases, score_sets
from service.db.repositories.leases import Owner
from service.executors.in_process import InProcess
from service.executors.protocol import Executor, ExecutorSettings
from service.records import JobRecord
from service.runner.context import JobContext
from service.settings import Settings
from service.states import JobKind

FAKES = Path(__file__).parents[1] / "executors"
SET = "a" * 64


@pytest.fixture
def score_set(database: Database) -> str:
    with database.write() as session:
        score_sets.ensure(session, SET, {"seed": 0})
    return SET


@pytest.fixture
def settings(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.syspath_prepend(str(FAKES))
    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        executor="in_process",
        session_factory="fake_session:FakeSession",
        workers=2,
        poll_seconds=0.02,
        grace_seconds=5,
    )


@pytest.fixture
def new_job(database: Database) -> Callable[..., JobRecord]:
    def create(kind: JobKind = JobKind.SEARCH) -> JobRecord:
        with database.write() as session:
            return jobs.create(session, kind=kind, request={}, request_digest="d")

    return create


@pytest.fixture
def current(database: Database) -> Callable[[JobRecord], JobRecord]:
    def read(job: JobRecord) -> JobRecord:
        with database.read() as session:
            found = jobs.get(session, job.id)
        assert found is not None
        return found

    return read


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def new_context(
    database: Database, settings: Settings, new_job: Callable[[], JobRecord], stop: threading.Event
) -> Callable[..., JobContext]:
    """A context of a freshly claimed job."""

    def make(make_executor: Callable[[ExecutorSettings], Executor] = InProcess) -> JobContext:
        new_job()
        with database.write() as session:
            job = leases.claim(session, Owner("test", "host", 1, "p"), settings.lease_seconds)
        assert job is not None
        return JobContext(job, settings=settings, database=database, make_executor=make_executor, stop=stop)

    return make


@pytest.fixture
def spec(tmp_path: Path) -> SessionSpec:
    notes = str(tmp_path / "notes.txt")
    return SessionSpec(ModelSource("folder", "fine", "aa"), DataSource(notes, "text", "bb"))


@pytest.fixture
def measured(tmp_path: Path) -> Callable[[], list[str]]:
    """The keys of all units that sessions have run."""

    def read() -> list[str]:
        lines = (tmp_path / "notes.txt").read_text().splitlines()
        return [line for line in lines if line != "built"]

    return read


@pytest.fixture
def executor(settings: Settings, spec: SessionSpec) -> Iterator[Executor]:
    """A started in-process executor."""
    executor = InProcess(ExecutorSettings(1, settings.data_dir / "logs", settings.session_factory))
    executor.start(spec)
    yield executor
    executor.close(0)
