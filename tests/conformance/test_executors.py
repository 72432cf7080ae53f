"""What every executor of the catalog must do."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import BlockUnit, InspectUnit, MeasureUnit, ScoreUnit, Unit
from service.executors.catalog import EXECUTORS, make_executor
from service.executors.protocol import Executor, ExecutorSettings, Outcome
from service.executors.ray_settings import RaySettings
from tests.ray_nodes import RayNodes

FAKES = Path(__file__).parents[1] / "service" / "executors"
PATIENCE_SECONDS = 120
CLUSTERS = {"ray": pytest.mark.slow}
"""Executors that need other processes than their own; starting those takes seconds."""


def listed(names: Iterable[str]) -> list[Any]:
    """The names as parameters, with their marks."""
    return [pytest.param(name, marks=CLUSTERS.get(name, ())) for name in sorted(names)]


ALL = listed(EXECUTORS)
ISOLATED = listed(name for name, kind in EXECUTORS.items() if kind.isolated)
Make = Callable[..., Executor]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A Ray cluster of a head and two nodes with two CPUs each: two executors fit at once."""
    secret = {"HF_TOKEN": "secret-value"}
    with RayNodes(tmp_path_factory.mktemp("nodes"), [FAKES], secret) as cluster:
        cluster.add("one")
        cluster.add("two")
        yield cluster


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes started executors with fake sessions, and closes them."""
    monkeypatch.syspath_prepend(str(FAKES))
    made: list[Executor] = []

    def start(name: str, location: str = "fine", workers: int = 2, factory: str = "FakeSession") -> Executor:
        ray = RaySettings()
        if name == "ray":
            cluster = request.getfixturevalue("nodes")
            ray = RaySettings(cluster.address, token_file=str(cluster.token_file))
        settings = ExecutorSettings(workers, tmp_path / "logs", f"fake_session:{factory}", ray=ray)
        executor = make_executor(name, settings)
        executor.start(spec(tmp_path, location))
        made.append(executor)
        return executor

    yield start
    for executor in made:
        executor.close(0)


def spec(tmp_path: Path, location: str = "fine") -> SessionSpec:
    notes = str(tmp_path / "notes.txt")
    return SessionSpec(ModelSource("folder", location, "aa"), DataSource(notes, "text", "bb"))


def notes(tmp_path: Path) -> list[str]:
    return (tmp_path / "notes.txt").read_text().splitlines()


def score(layer: str, scheme: str = "w4", *metrics: str) -> ScoreUnit:
    return ScoreUnit(layer, scheme, metrics or ("output_kl",))


def collect(executor: Executor, count: int) -> dict[str, Outcome]:
    """The next `count` outcomes by key, each key once."""
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(outcomes) < count:
        assert time.monotonic() < deadline, f"only {sorted(outcomes)} came"
        for outcome in executor.wait(0.5):
            assert outcome.key not in outcomes
            outcomes[outcome.key] = outcome
    return outcomes


def run(executor: Executor, *units: Unit) -> dict[str, Outcome]:
    for unit in units:
        executor.submit(unit.key, unit)
    return collect(executor, len(units))


def failure_kind(outcome: Outcome) -> str:
    assert outcome.result is None
    assert outcome.failure is not None
    return outcome.failure.kind


UNITS: tuple[Unit, ...] = (
    score("a", "w2", "output_kl", "gram_output"),
    score("b"),
    BlockUnit("fisher", "samples:0:8", ("w2",), ("a", "b"), {"0": np.arange(6, dtype=np.float32)}),
    MeasureUnit((("a", "w2"),), "choosing"),
    InspectUnit(),
)


@pytest.mark.parametrize("name", ALL)
def test_the_catalog_names_its_executors(name: str, make: Make) -> None:
    executor = make(name)
    assert executor.name == name
    assert executor.capacity >= 1


@pytest.mark.parametrize("name", ALL)
def test_results_equal_those_of_the_session_itself(name: str, make: Make, tmp_path: Path) -> None:
    outcomes = run(make(name), *UNITS)
    from fake_session import FakeSession

    session = FakeSession(spec(tmp_path))
    for unit in UNITS[:4]:
        found, expected = outcomes[unit.key].result, session.run(unit)
        assert found is not None
        assert found.scores == expected.scores
        assert dict(found.facts) == dict(expected.facts)
        assert set(found.arrays) == set(expected.arrays)
        for key, array in expected.arrays.items():
            np.testing.assert_array_equal(found.arrays[key], array)
            assert found.arrays[key].dtype == array.dtype


@pytest.mark.parametrize("name", ALL)
def test_order_does_not_matter(name: str, make: Make) -> None:
    forward, backward = run(make(name), *UNITS), run(make(name), *reversed(UNITS))
    for unit in UNITS[:2]:
        first, second = forward[unit.key].result, backward[unit.key].result
        assert first is not None
        assert second is not None
        assert first.scores == second.scores


@pytest.mark.parametrize("name", ALL)
def test_many_units_each_once_from_few_sessions(name: str, make: Make, tmp_path: Path) -> None:
    executor = make(name)
    units = [score(f"layer{index}", f"w{bits}") for index in range(100) for bits in (2, 4)]
    outcomes = run(executor, *units)
    assert all(outcome.result is not None for outcome in outcomes.values())
    assert executor.wait(0) == []
    assert sorted(line for line in notes(tmp_path) if line != "built") == sorted(unit.key for unit in units)
    assert notes(tmp_path).count("built") <= executor.capacity


@pytest.mark.parametrize("name", ALL)
def test_waiting_without_units_gives_nothing(name: str, make: Make) -> None:
    assert make(name).wait(0.01) == []


@pytest.mark.parametrize("name", ALL)
def test_an_error_is_the_failure_of_its_unit_alone(name: str, make: Make) -> None:
    outcomes = run(make(name), score("error"), score("fine"), score("nonfinite"))
    failed = outcomes[score("error").key]
    assert failure_kind(failed) == "unit_error"
    assert failed.failure is not None
    assert failed.failure.message == "The layer must behave. Got an error."
    assert failed.failure.detail["error"] == "RuntimeError"
    nonfinite = outcomes[score("nonfinite").key].failure
    assert nonfinite is not None
    assert nonfinite.detail["error"] == "non_finite"
    assert outcomes[score("fine").key].result is not None


@pytest.mark.parametrize("name", ALL)
def test_nan_is_an_error_not_a_score(name: str, make: Make) -> None:
    (outcome,) = run(make(name), score("nan")).values()
    assert failure_kind(outcome) == "unit_error"


@pytest.mark.parametrize("name", ALL)
def test_lack_of_memory_is_told_apart(name: str, make: Make) -> None:
    outcomes = run(make(name), score("memory"), score("fine"))
    assert failure_kind(outcomes[score("memory").key]) == "out_of_memory"
    assert outcomes[score("fine").key].result is not None


@pytest.mark.parametrize("name", ALL)
def test_a_session_that_cannot_be_built_is_bad_input_and_tried_once(
    name: str, make: Make, tmp_path: Path
) -> None:
    executor = make(name, "broken", workers=1)
    outcomes = run(executor, score("a"), score("b"), score("c"))
    for outcome in outcomes.values():
        assert failure_kind(outcome) == "bad_input"
        assert outcome.failure is not None
        assert outcome.failure.message.startswith("The model must load.")
        assert outcome.failure.detail["error"] == "bad_model"
    assert notes(tmp_path) == ["built"]


@pytest.mark.parametrize("name", ALL)
def test_a_factory_that_does_not_exist_is_bad_input(name: str, make: Make) -> None:
    (outcome,) = run(make(name, factory="Missing", workers=1), score("a")).values()
    assert failure_kind(outcome) == "bad_input"


@pytest.mark.parametrize("name", ALL)
def test_big_arrays_come_whole(name: str, make: Make) -> None:
    (outcome,) = run(make(name, workers=1), score("big")).values()
    assert outcome.result is not None
    (array,) = outcome.result.arrays.values()
    assert array.nbytes == 50 * 2**20
    np.testing.assert_array_equal(array, np.arange(array.size))


@pytest.mark.parametrize("name", ALL)
def test_closing_drops_what_is_queued(name: str, make: Make) -> None:
    executor = make(name)
    for index in range(50):
        executor.submit(str(index), score(f"sleep:0.2{index}"))
    executor.close(0)
    executor.close(0)
    assert len(executor.wait(0)) < 50


@pytest.mark.parametrize("name", ISOLATED)
def test_a_crash_costs_one_unit(name: str, make: Make) -> None:
    others = [score(f"layer{index}") for index in range(20)]
    outcomes = run(make(name), score("kill"), *others[:10], score("exit"), *others[10:])
    killed = outcomes[score("kill").key].failure
    assert killed is not None
    assert killed.kind == "worker_crash"
    assert killed.detail["signal"] == "SIGKILL"
    assert "about to die" in killed.detail["log_tail"]
    left = outcomes[score("exit").key].failure
    assert left is not None
    assert left.detail["exit_code"] == 3
    assert all(outcomes[unit.key].result is not None for unit in others)


@pytest.mark.parametrize("name", ISOLATED)
def test_a_crashed_unit_may_be_tried_again(name: str, make: Make, tmp_path: Path) -> None:
    unit = score(f"kill_once:{tmp_path / 'marker'}")
    executor = make(name)
    assert failure_kind(run(executor, unit)[unit.key]) == "worker_crash"
    assert run(executor, unit)[unit.key].result is not None


@pytest.mark.parametrize("name", ISOLATED)
def test_a_session_that_kills_its_process_ends_in_crashes_not_in_a_loop(
    name: str, make: Make, tmp_path: Path
) -> None:
    outcomes = run(make(name, "deadly", workers=1), score("a"), score("b"))
    assert {failure_kind(outcome) for outcome in outcomes.values()} == {"worker_crash"}
    assert len(notes(tmp_path)) <= 3


@pytest.mark.parametrize("name", ISOLATED)
def test_a_worker_killed_from_outside_is_replaced(name: str, make: Make) -> None:
    executor = make(name, workers=1, factory="environment_of_worker")
    first = run(executor, score("a"))[score("a").key].result
    assert first is not None
    os.kill(first.facts["pid"], signal.SIGKILL)
    outcomes = run(executor, score("b"), score("c"))
    assert sorted(str(outcome.failure and outcome.failure.kind) for outcome in outcomes.values()) == [
        "None",
        "worker_crash",
    ]


@pytest.mark.parametrize("name", ISOLATED)
def test_closing_while_busy_kills_the_workers(name: str, make: Make) -> None:
    executor = make(name, workers=1, factory="environment_of_worker")
    result = run(executor, score("a"))[score("a").key].result
    assert result is not None
    executor.close(0)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while alive(result.facts["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    busy = make(name, workers=2)
    run(busy, score("warm"))
    busy.submit("slow", score("sleep:600"))
    time.sleep(0.2)
    busy.close(0.1)
    assert busy.wait(0) == []


@pytest.mark.parametrize("name", ISOLATED)
def test_a_unit_that_ends_within_the_grace_is_not_lost(name: str, make: Make) -> None:
    executor = make(name, workers=1)
    run(executor, score("warm"))
    executor.submit("slow", score("sleep:1"))
    time.sleep(0.3)
    executor.close(30)
    (outcome,) = executor.wait(0)
    assert outcome.key == "slow"
    assert outcome.result is not None


@pytest.mark.parametrize("name", ISOLATED)
def test_workers_know_no_secrets(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in ("BITPLAN_DATABASE_URL", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "BITPLAN_DATA_DIR"):
        monkeypatch.setenv(secret, "secret-value")
    (outcome,) = run(make(name, workers=1, factory="environment_of_worker"), score("a")).values()
    assert outcome.result is not None
    found = outcome.result.facts["environment"]
    assert "secret-value" not in found.values()
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["OMP_NUM_THREADS"] == "1"
    assert outcome.result.facts["torch"] is False


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
