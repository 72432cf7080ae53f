"""A seeded executor that dies, duplicates, reorders and delays: the stored rows come out the same."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from sensitivity.spec import SessionSpec
from sensitivity.units import ScoreUnit, Unit
from service.db.engine import Database
from service.db.repositories import scores, units
from service.executors.in_process import InProcess
from service.executors.protocol import ExecutorSettings, Failure, Outcome
from service.runner.context import JobContext
from service.runner.dispatch import Dispatched, run_units
from service.settings import Settings
from service.states import Stage

WANTED = [
    ScoreUnit(f"layer{index}", scheme, ("output_kl", "sqnr"))
    for index in range(12)
    for scheme in ("w2", "w4")
]


class Chaos:
    """Wraps the in-process executor; what goes wrong is drawn from the seed, at most two deaths per unit."""

    name, capacity = "chaos", 4

    def __init__(self, settings: ExecutorSettings, seed: int):
        self._inner, self._random = InProcess(settings), random.Random(seed)
        self._units: dict[str, Unit] = {}
        self._held: list[Outcome] = []
        self.deaths: Counter[str] = Counter()
        self.duplicates = 0

    def start(self, spec: SessionSpec) -> None:
        self._inner.start(spec)

    def submit(self, key: str, unit: Unit) -> None:
        self._units[key] = unit

    def wait(self, timeout: float) -> list[Outcome]:
        """Some of what has ended, in any order; the rest is held back for later."""
        keys = list(self._units)
        self._random.shuffle(keys)
        for key in keys[: self._random.randrange(3)]:
            self._held += self._attempt(key, self._units.pop(key))
        self._random.shuffle(self._held)
        count = self._random.randrange(4)
        given, self._held = self._held[:count], self._held[count:]
        return given

    def _attempt(self, key: str, unit: Unit) -> list[Outcome]:
        if self.deaths[key] < 2 and self._random.random() < 0.3:
            self.deaths[key] += 1
            return [Outcome(key, failure=Failure("worker_crash", "chaos", {}))]
        self._inner.submit(key, unit)
        outcomes = self._inner.wait(0)
        if self._random.random() < 0.3:
            self.duplicates += 1
            outcomes *= 2
        return outcomes

    def close(self, grace_seconds: float = 10.0) -> None:
        self._inner.close(grace_seconds)


@pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("seed", range(5))
def test_chaos_changes_nothing_that_is_stored(
    seed: int,
    new_context: Callable[..., JobContext],
    settings: Settings,
    spec: SessionSpec,
    score_set: str,
    database: Database,
) -> None:
    context = new_context()
    chaos = Chaos(ExecutorSettings(1, settings.data_dir, settings.session_factory), seed)
    chaos.start(spec)
    assert run_units(context, chaos, score_set, WANTED, Stage.SCORING) == Dispatched(24, 0)
    assert chaos.deaths.total() > 0
    assert chaos.duplicates > 0

    from fake_session import FakeSession

    expected = [row for unit in WANTED for row in FakeSession(spec).run(unit).scores]
    with database.read() as session:
        stored = scores.list_all(session, score_set)
        assert units.faults(session, score_set) == ()
        assert len(units.keys(session, score_set)) == len(WANTED)
    assert [
        (row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples) for row in stored
    ] == sorted((row.layer, row.scheme, row.metric, row.value, row.stderr, row.samples) for row in expected)
