"""kill -9 of the API, the runner and the worker, as three processes, at every named place: nothing is lost.

Each test sends a model over HTTP while one process kills itself twice, at an early and at a later pass of one
failpoint (counted per process: `name:1` fires in the first process, `name:5` in one that came after it).
Whatever dies is started again with the same environment; the client is the ordinary one, with its retries.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service.db.repositories import events, jobs, scores, units
from service.db.tables import ScoreRow
from service.failpoints import FAILPOINTS
from service.states import TERMINAL

SCHEMES = ("w2", "w3", "w4")
METRICS = ("output_kl", "fisher")
BUDGETS = ("3 bpw", "uniform w3")
JOB_SECONDS = 250

PASSES = {
    "api.blob_written": (1, 2),
    "api.before_commit": (1, 3),
    "api.after_commit": (1, 3),
    "runner.after_claim": (1, 2),
    "runner.before_store": (1, 7, 16),
    "runner.artifact_written": (1, 7, 16),
    "runner.after_store": (1, 7, 16),
    "runner.scoring": (1, 8),
    "runner.choosing": (1, 3),
    "runner.reporting": (1, 3),
    "runner.writing_plan": (1, 2),
    "runner.before_finish": (1, 2),
    "worker.before_unit": (1, 7, 16),
    "worker.after_unit": (1, 7, 16),
}
"""Early: loading or verifying. Middle: scoring. Late: choosing and reporting."""
ELSEWHERE = {
    "runner.checkpoint_stored": "test_checkpoint_kill.py",
    "runner.hub_announced": "../service/runner/test_hub_model.py",
    "runner.hub_fetching": "../service/runner/test_hub_model.py",
    "runner.hub_arrived": "../service/runner/test_hub_model.py",
    "webhook.before_send": "../service/runner/test_deliveries.py",
    "webhook.after_send": "../service/runner/test_deliveries.py",
}
"""Failpoints that no job of this file passes, and the file that kills at them."""


@dataclass(frozen=True)
class Ended:
    """What a job left behind: the plan files, and every row that must be there once."""

    plans: tuple[bytes, ...]
    rows: frozenset[tuple[Any, ...]]


def send_and_wait(service, given, budgets=BUDGETS, **search: Any) -> Any:
    client = service.client()
    job = client.submit(
        given.folder,
        given.calibration,
        budgets,
        schemes=SCHEMES,
        metrics=METRICS,
        samples=8,
        batch_size=4,
        **{"evaluations": 3, **search},
    )
    return job.wait(timeout=JOB_SECONDS)


def ended(service, job, folder: Path) -> Ended:
    files = tuple(plan.save(folder / "plan.json").read_bytes() for plan in job.plans())
    with service.database() as database, database.read() as session:
        rows = session.scalars(select(ScoreRow)).all()
        found = [(row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples) for row in rows]
    assert len(found) == len({row[:3] for row in found})
    return Ended(files, frozenset(found))


@pytest.fixture(scope="module")
def undisturbed(new_service, resnet, tmp_path_factory) -> Iterator[Ended]:
    service = new_service()
    try:
        job = send_and_wait(service.start(), resnet)
        yield ended(service, job, tmp_path_factory.mktemp("undisturbed"))
    finally:
        service.stop()


def check(service, job, undisturbed: Ended, folder: Path) -> None:
    assert job.state == "succeeded"
    assert ended(service, job, folder) == undisturbed
    check_stories(service)
    check_nothing_is_measured_again(service, job.resource["score_set"])


def check_stories(service) -> None:
    """Every job has one terminal event, which is its state and its last event; there is one search."""
    with service.database() as database, database.read() as session:
        everything = jobs.list_page(session, limit=50)
        for job in everything:
            story = [event.type for event in events.list_after(session, job.id)]
            assert [kind for kind in story if kind in TERMINAL] == ["succeeded"]
            assert (story[-1], job.state) == ("succeeded", "succeeded")
    assert sorted(job.kind for job in everything) == ["search", "verify_model"]


def check_nothing_is_measured_again(service, score_set: str) -> None:
    """No unit, and no (layer, scheme, metric), was sent to a worker after it was stored; no repetition differed.

    What blocks were combined to is made by the runner itself.
    """
    with service.database() as database, database.read() as session:
        stored = {key: units.get(session, score_set, key) for key in units.keys(session, score_set)}
        rows = scores.list_all(session, score_set)
        assert units.faults(session, score_set) == ()
    cells = {(row.layer, row.scheme, row.metric): row.unit_key for row in rows}
    sent = service.logged("dispatch.unit")
    assert {line["key"] for line in sent} == {key for key in stored if not key.startswith("combined:")}
    for line in sent:
        when = datetime.fromisoformat(line["timestamp"]).astimezone(UTC)
        kept = [line["key"], *(cells[cell] for cell in cells_of(line["key"]))]
        assert all(when < stored[key].created_at for key in kept), line


def cells_of(key: str) -> list[tuple[str, str, str]]:
    if not key.startswith("score:"):
        return []
    _, layer, scheme, metrics = key.split(":")
    return [(layer, scheme, metric) for metric in metrics.split("+")]


def failpoints_of(name: str, once: Path) -> dict[str, str]:
    entries = ",".join(f"{name}:{nth}=kill" for nth in PASSES[name])
    return {"BITPLAN_FAILPOINTS": entries, "BITPLAN_FAILPOINTS_ONCE": str(once)}


def check_kills_at(name: str, start, undisturbed: Ended, given, folder: Path, url: str = "") -> None:
    once = folder / "once"
    once.mkdir()
    service = start(failpoints_of(name, once), url).supervise()
    job = send_and_wait(service, given)
    assert {marker.name for marker in once.iterdir()} == {f"{name}.{nth}.kill" for nth in PASSES[name]}
    role = name.partition(".")[0]
    assert service.deaths == ({} if role == "worker" else {role: len(PASSES[name])})
    check(service, job, undisturbed, folder)


def test_every_failpoint_is_tried():
    assert set(PASSES) | set(ELSEWHERE) == set(FAILPOINTS)
    for name, file in ELSEWHERE.items():
        assert name in (Path(__file__).parent / file).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_a_process_killed_at(name, start, undisturbed, resnet, tmp_path):
    check_kills_at(name, start, undisturbed, resnet, tmp_path)


@pytest.mark.postgres
@pytest.mark.parametrize("name", ["worker.after_unit", "runner.artifact_written", "api.before_commit"])
def test_a_process_killed_on_postgresql_at(name, start, undisturbed, resnet, tmp_path, postgres_url):
    check_kills_at(name, start, undisturbed, resnet, tmp_path, postgres_url)


@pytest.mark.slow
def test_a_search_killed_among_its_trials_measures_none_twice(start, resnet, tmp_path):
    """Once among the candidates, once among the plans that Optuna suggests."""
    once = tmp_path / "once"
    once.mkdir()
    entries = "runner.choosing:3=kill,runner.choosing:14=kill"
    service = start({"BITPLAN_FAILPOINTS": entries, "BITPLAN_FAILPOINTS_ONCE": str(once)}, "").supervise()
    job = send_and_wait(service, resnet, ["3 bpw"], chooser="nsga2", evaluations=12)
    assert service.deaths == {"runner": 2}
    check_stories(service)
    check_nothing_is_measured_again(service, job.resource["score_set"])
    [plan] = job.plans()
    assert sum(tried["source"] == "nsga2" for tried in plan.resource["candidates"]) == 12
    assert plan.resource["pareto"]


class Killer(threading.Thread):
    """Kills each of `roles` once, in a seeded order, with seeded pauses between."""

    def __init__(self, service, roles: list[str], seed: int) -> None:
        super().__init__(daemon=True)
        self.service, self.killed = service, Counter[str]()
        self._chance = random.Random(seed)
        self._roles = self._chance.sample(roles, len(roles))

    def run(self) -> None:
        for role in self._roles:
            time.sleep(self._chance.uniform(0.2, 3.0))
            deadline = time.monotonic() + 30
            while not self.service.kill(role) and time.monotonic() < deadline:
                time.sleep(0.02)
            self.killed[role] += 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_processes_killed_at_random_times(seed, start, undisturbed, resnet, tmp_path):
    """Two kills each; a unit that costs three workers their lives would rightly fail the job."""
    service = start().supervise()
    killer = Killer(service, ["api", "runner", "worker"] * 2, seed)
    killer.start()
    job = send_and_wait(service, resnet)
    killer.join()
    assert set(killer.killed) == {"api", "runner", "worker"}
    assert service.deaths["api"] >= 1
    assert service.deaths["runner"] >= 1
    service.wait_until_ready()
    check(service, job.refresh(), undisturbed, tmp_path)
