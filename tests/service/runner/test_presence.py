"""A runner is known while it serves, with what it counts; and it collects garbage."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from service.db.engine import Database
from service.db.repositories import runners
from service.db.repositories.leases import Owner
from service.executors.protocol import ExecutorSettings, Failure, Outcome
from service.metrics import RUNNER
from service.records import RunnerRecord
from service.runner import presence
from service.runner.identity import host_name, this_process
from service.runner.loop import Runner
from service.settings import Settings
from service.states import JobKind


def known(database: Database) -> tuple[RunnerRecord, ...]:
    with database.read() as session:
        return runners.list_all(session)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_runner_is_known_until_it_ends(settings: Settings, database: Database) -> None:
    quick = settings.model_copy(update={"heartbeat_seconds": 0.05})
    dead = Owner("dead", host_name(), 999_999_999, "boot/1")
    elsewhere = Owner("elsewhere", "another host", 999_999_999, "boot/1")
    with database.write() as session:
        for owner in (dead, elsewhere):
            runners.beat(session, owner, "1", "")
    owner = this_process()
    with presence.present(quick, database, owner):
        assert {runner.name for runner in known(database)} == {"elsewhere", owner.name}
        before = RUNNER.get_sample_value("bitplan_worker_deaths_total") or 0
        presence.metrics.WORKER_DEATHS.inc()
        told = f"bitplan_worker_deaths_total {before + 1}"
        wait_for(lambda: any(told in runner.metrics for runner in known(database)))
    assert {runner.name for runner in known(database)} == {"elsewhere"}


def test_a_runner_collects_and_says_so(settings: Settings, database: Database, monkeypatch) -> None:
    monkeypatch.setattr(presence, "FIRST_COLLECTION_SECONDS", 0.01)
    collected = threading.Event()
    found = presence.collect

    def collect(*given: object, **options: object) -> object:
        try:
            if not collected.is_set():
                raise OSError("the disk is away")
            return found(*given, **options)  # type: ignore[arg-type]
        finally:
            collected.set()

    monkeypatch.setattr(presence, "collect", collect)
    often = settings.model_copy(update={"gc_interval_hours": 1e-5})
    with presence.collecting(often, database):
        assert collected.wait(60)
        wait_for(lambda: RUNNER.get_sample_value("bitplan_collected_total", {"what": "blobs"}) is not None)


def test_collection_can_be_switched_off(settings: Settings, database: Database, monkeypatch) -> None:
    monkeypatch.setattr(presence, "collect", lambda *_, **__: 1 / 0)
    with presence.collecting(settings.model_copy(update={"gc_interval_hours": 0.0}), database):
        pass


class Mortal:
    """An executor whose first unit costs a worker its life."""

    name, capacity = "mortal", 1

    def __init__(self, settings: ExecutorSettings) -> None:
        self._outcomes: list[Outcome] = []
        self._deaths = 1

    def start(self, spec: object) -> None:
        pass

    def submit(self, key: str, unit: object) -> None:
        from sensitivity.units import ScoreRow, UnitResult

        if self._deaths:
            self._deaths -= 1
            detail = {"log": "worker.log"}
            self._outcomes.append(Outcome(key, failure=Failure("worker_crash", "It died.", detail)))
            return
        rows = (ScoreRow("a", "w4", "output_kl", 0.5, None, 8),)
        self._outcomes.append(Outcome(key, result=UnitResult(scores=rows)))

    def wait(self, timeout: float) -> list[Outcome]:
        found, self._outcomes = self._outcomes, []
        return found

    def close(self, grace_seconds: float = 10.0) -> None:
        pass


def test_jobs_are_counted_and_every_line_names_them(
    settings: Settings, database: Database, new_job, spec, capsys
) -> None:
    from sensitivity.units import ScoreUnit
    from service import logs
    from service.runner.dispatch import run_units
    from service.states import Stage

    def value(name: str, **labels: str) -> float:
        return RUNNER.get_sample_value(name, labels) or 0.0

    def counts() -> list[float]:
        return [
            value("bitplan_worker_deaths_total"),
            value("bitplan_units_total", outcome="measured"),
            value("bitplan_units_total", outcome="failed"),
            value("bitplan_units_total", outcome="reused"),
            value("bitplan_unit_seconds_count", kind="score"),
            value("bitplan_job_seconds_count", kind="search", state="succeeded"),
        ]

    def handler(context):
        context.open_score_set("a" * 64, {"seed": 0})
        executor = context.executor(spec)
        for _ in range(2):
            run_units(context, executor, "a" * 64, [ScoreUnit("a", "w4", ("output_kl",))], Stage.SCORING)

    logs.configure("info")
    job, before = new_job(), counts()
    Runner(settings, database, {JobKind.SEARCH: handler}, Mortal).run_one()
    assert [after - then for after, then in zip(counts(), before, strict=True)] == [1, 1, 1, 1, 2, 1]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert {line["event"] for line in lines} >= {"job.claimed", "dispatch.worker_crash", "job.finished"}
    assert {line["job"] for line in lines} == {job.id}
    assert {line["epoch"] for line in lines} == {1}
