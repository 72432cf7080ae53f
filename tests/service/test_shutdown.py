"""SIGTERM to real processes: requests are answered, results are kept, jobs go back, workers end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service.db import migrate
from service.db.engine import Database
from service.db.repositories import events, jobs, runners, scores
from service.serve import start_child
from service.settings import Settings
from service.states import JobKind, JobState

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60
RUNNER = """
import sys
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import ScoreUnit
from service.runner import process
from service.runner.dispatch import run_units
from service.settings import Settings
from service.states import JobKind, Stage

def handler(context):
    spec = SessionSpec(ModelSource("folder", "fine", "aa"), DataSource(sys.argv[1], "text", "bb"))
    context.open_score_set("a" * 64, {"seed": 0})
    executor = context.executor(spec)
    units = [ScoreUnit(layer, "w4", ("output_kl",)) for layer in ("l0", sys.argv[2], "l1")]
    run_units(context, executor, "a" * 64, units, Stage.SCORING)

process.load_handlers = lambda: {JobKind.SEARCH: handler}
process.run(Settings())
"""


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Settings(
        data_dir=tmp_path / "data",
        database_url=f"sqlite:///{tmp_path}/bitplan.db",
        port=port,
        workers=1,
        poll_seconds=0.05,
        session_factory="fake_session:FakeSession",
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    migrate.upgrade(settings.database_url)
    with closing(Database(settings.database_url)) as database:
        yield database


@pytest.mark.parametrize(
    ("layer", "grace", "kept"),
    [
        ("sleep:1", 60.0, ["l0", "sleep:1"]),
        pytest.param("sleep:600", 0.1, ["l0"], marks=pytest.mark.slow),
    ],
)
def test_a_runner_keeps_results_and_gives_its_job_back(
    settings: Settings, database: Database, tmp_path: Path, layer: str, grace: float, kept: list[str]
) -> None:
    with database.write() as session:
        job = jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d")
    quick = settings.model_copy(update={"grace_seconds": grace})
    notes = tmp_path / "notes" / "notes.txt"
    notes.parent.mkdir()
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent / "executors")])
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(notes), layer],
        env={**os.environ, **quick.as_environment(), "PYTHONPATH": paths},
    )
    try:
        wait_for(lambda: notes.exists() and f"{layer}:" in notes.read_text())
        with database.read() as session:
            assert [runner.pid for runner in runners.list_all(session)] == [process.pid]
        workers = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
    assert workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    with database.read() as session:
        found = jobs.get(session, job.id)
        assert found is not None
        assert (found.state, found.lease_owner, found.lease_expires_at) == (JobState.QUEUED, None, None)
        assert events.list_after(session, job.id)[-1].data["reason"] == "the runner stops"
        assert [row.layer for row in scores.list_all(session, "a" * 64)] == kept
        assert runners.list_all(session) == ()


def children(pid: int) -> list[str]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for listing in lists for child in listing.read_text().split()]


@pytest.mark.slow
def test_an_api_answers_what_it_has_begun(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is held at its commit until the signal has been sent; new connections are refused then."""
    monkeypatch.setenv("BITPLAN_FAILPOINTS", "api.before_commit:1=sleep:2")
    monkeypatch.setenv("BITPLAN_FAILPOINTS_ONCE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    api = start_child("api", settings)
    answered: list[int] = []

    def send() -> None:
        file = {"path": "text.txt", "size": 2, "sha256": "a" * 64}
        body = json.dumps({"purpose": "calibration", "files": [file]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{settings.port}/v1/uploads", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            answered.append(answer.status)

    try:
        wait_for(lambda: listens(settings.port))
        thread = threading.Thread(target=send)
        thread.start()
        wait_for(lambda: list(tmp_path.glob("api.before_commit.*")))
        api.send_signal(signal.SIGTERM)
        wait_for(lambda: not listens(settings.port))
        thread.join(PATIENCE_SECONDS)
        assert answered == [201]
        assert api.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM), "uvicorn ends by the signal it was sent"
    finally:
        api.kill()
        api.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
