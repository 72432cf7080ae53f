"""Executors that die, hang, duplicate, reorder, answer wrongly and are slow, by seed: what is stored is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sensitivity.spec import SessionSpec
from sensitivity.units import BlockUnit, MeasureUnit, ScoreUnit, Unit
from service.db.engine import Database
from service.db.repositories import attempts, plans, scores, units
from service.executors.catalog import EXECUTORS, make_executor
from service.executors.protocol import Executor, ExecutorSettings
from service.executors.ray_settings import RaySettings
from service.local import Local
from service.local_inputs import file_data, folder_source
from service.runner.context import JobContext
from service.runner.dispatch import DEATHS, Dispatched, run_units
from service.settings import Settings
from service.states import Stage
from tests.chaos_executor import HARMLESS, MOST_SPOILED, SPOILED, Chaos
from tests.ray_nodes import RayNodes

FAKES = Path(__file__).parents[1] / "executors"
SCORED = [
    ScoreUnit(f"layer{index}", scheme, ("output_kl", "sqnr"))
    for index in range(12)
    for scheme in ("w2", "w4")
]
WANTED: list[Unit] = [
    *SCORED,
    *(BlockUnit("fisher", f"samples:{start}:{start + 8}", ("w2",), ("a", "b")) for start in (0, 8, 16)),
    *(MeasureUnit(((f"layer{index}", "w2"),), "choosing") for index in range(3)),
]
LONG = {"local_pool": pytest.mark.slow, "ray": pytest.mark.nightly}
SEEDS = [
    pytest.param(name, seed, marks=LONG.get(name, ()))
    for name, count in (("in_process", 8), ("local_pool", 2), ("ray", 2))
    for seed in range(count)
]
MakeChaos = Callable[[ExecutorSettings], Executor]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with RayNodes(tmp_path_factory.mktemp("nodes"), [FAKES]) as cluster:
        cluster.add("one", cpus=1)
        cluster.add("two", cpus=1)
        yield cluster


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Callable[[str, Settings], Settings]:
    """The settings with an executor by name."""

    def choose(name: str, settings: Settings) -> Settings:
        more = request.getfixturevalue("nodes").settings if name == "ray" else {}
        return settings.model_copy(update={"executor": name, **more})

    return choose


def test_the_suite_names_every_executor() -> None:
    assert {param.values[0] for param in SEEDS} == set(EXECUTORS)
    assert MOST_SPOILED < DEATHS


@pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("name", "seed"), SEEDS)
def test_chaos_changes_nothing_that_is_stored(
    name: str,
    seed: int,
    chosen: Callable[[str, Settings], Settings],
    new_context: Callable[..., JobContext],
    settings: Settings,
    spec: SessionSpec,
    score_set: str,
    database: Database,
) -> None:
    context = new_context()
    found = chosen(name, settings)
    ray = RaySettings(found.ray_address, token_file=found.ray_token_file)
    logs = ExecutorSettings(2, settings.data_dir / "logs", settings.session_factory, ray=ray)
    chaos = Chaos(make_executor(name, logs), seed)
    chaos.start(spec)
    assert run_units(context, chaos, score_set, WANTED, Stage.SCORING) == Dispatched(len(WANTED), 0)
    chaos.close(0)
    assert not {*SPOILED, *HARMLESS} - chaos.happened.keys()

    from fake_session import FakeSession

    expected = [row for unit in SCORED for row in FakeSession(spec).run(unit).scores]
    with database.read() as session:
        stored = scores.list_all(session, score_set)
        assert units.faults(session, score_set) == ()
        assert len(units.keys(session, score_set)) == len(WANTED)
        died = [record.attempts for record in attempts.list_job(session, context.job.id)]
    assert died
    assert max(died) < DEATHS
    assert [
        (row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples) for row in stored
    ] == sorted((row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples) for row in expected)


def test_equal_seeds_do_equal_harm(spec: SessionSpec, tmp_path: Path) -> None:
    def harm(seed: int) -> dict[str, int]:
        settings = ExecutorSettings(1, tmp_path, "fake_session:FakeSession")
        chaos = Chaos(make_executor("in_process", settings), seed)
        chaos.start(spec)
        for unit in WANTED:
            chaos.submit(unit.key, unit)
        return dict(chaos.happened)

    assert harm(1) == harm(1)
    assert harm(1) != harm(2)


def whole_job(
    settings: Settings, model: Any, monkeypatch: pytest.MonkeyPatch, made: list[Chaos], seed: int | None
) -> tuple[Any, ...]:
    """Scores and plans of a whole search, disturbed by a seed; without one undisturbed."""

    def disturbed(given: ExecutorSettings) -> Executor:
        made.append(Chaos(make_executor(settings.executor, given), int(seed or 0) + len(made)))
        return made[-1]

    with monkeypatch.context() as patch, Local(settings) as local:
        if seed is not None:
            patch.setattr(local._runner, "_make_executor", disturbed)
        request = local.request(
            local.model(folder_source(model.folder)),
            local.calibration(file_data(model.data)),
            {
                "budgets": ["4 bpw", "6 bpw"],
                "schemes": ["w2", "w4", "w8"],
                "metrics": ["output_kl", "sqnr", "fisher"],
                "samples": 8,
                "batch_size": 4,
                "seed": 5,
            },
        )
        job = local.run(request)
        assert job.state == "succeeded", job.problem
        with local.database.read() as session:
            rows = scores.list_all(session, str(job.score_set))
            assert units.faults(session, str(job.score_set)) == ()
            found = [plan.digest for plan in plans.list_job(session, job.id)]
    return [replace(row, score_set="") for row in rows], sorted(map(str, found))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LONG.get(name, pytest.mark.slow)) for name in sorted(EXECUTORS)]
)
def test_a_whole_job_under_chaos_ends_with_the_same_scores_and_plans(
    name: str,
    chosen: Callable[[str, Settings], Settings],
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("resnet")

    def at(folder: Path, executor: str) -> Settings:
        made = Settings(data_dir=folder, database_url=f"sqlite:///{folder}/bitplan.db", workers=2)
        return chosen(executor, made)

    made: list[Chaos] = []
    calm = whole_job(at(tmp_path / "calm", "in_process"), model, monkeypatch, made, None)
    assert made == []
    stormy = whole_job(at(tmp_path / "stormy", name), model, monkeypatch, made, 3)
    assert stormy == calm
    assert sum(chaos.happened[what] for chaos in made for what in SPOILED) > 0
