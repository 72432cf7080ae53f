import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sensitivity.spec import SessionSpec
from sensitivity.units import BlockUnit, MeasureUnit, ScoreRow, ScoreUnit, Unit, UnitResult
from service.db.engine import Database
from service.db.repositories import attempts, events, jobs, scores, units
from service.errors import ServiceError
from service.executors.catalog import make_executor
from service.executors.local_pool import LocalPool
from service.executors.protocol import Executor, ExecutorSettings, Failure, Outcome
from service.records import ScoreRecord
from service.runner import dispatch
from service.runner.context import JobContext
from service.runner.dispatch import Dispatched, missing_units, persist, run_alone, run_units, stored_result
from service.runner.signals import Cancelled, LeaseLost, ShuttingDown
from service.states import Stage

NewContext = Callable[..., JobContext]
Measured = Callable[[], list[str]]
OnStored = Callable[[Callable[[Unit, UnitResult], object]], None]
SCORING = Stage.SCORING


def stored_scores(context: JobContext, score_set: str) -> tuple[ScoreRecord, ...]:
    return context.read(lambda session: scores.list_all(session, score_set))


def score(layer: str, scheme: str = "w4", *metrics: str) -> ScoreUnit:
    return ScoreUnit(layer, scheme, metrics or ("output_kl",))


UNITS: tuple[Unit, ...] = (
    score("a", "w2", "output_kl", "gram_output"),
    score("b"),
    BlockUnit("fisher", "samples:0:8", ("w2",), ("a", "b")),
    MeasureUnit((("a", "w2"),), "choosing"),
    MeasureUnit((), "reporting"),
)


@pytest.fixture
def pool(settings: object, spec: SessionSpec, tmp_path: Path) -> Executor:
    executor = LocalPool(ExecutorSettings(2, tmp_path / "logs", "fake_session:FakeSession"))
    executor.start(spec)
    yield executor
    executor.close(0)


@pytest.fixture
def on_stored(monkeypatch: pytest.MonkeyPatch) -> OnStored:
    """on_stored(act): `act(unit, result)` runs behind the commit of every new unit."""

    def listen(act: Callable[[Unit, UnitResult], object]) -> None:
        def stored(context: JobContext, score_set: str, unit: Unit, result: UnitResult) -> bool:
            new = persist(context, score_set, unit, result)
            if new:
                act(unit, result)
            return new

        monkeypatch.setattr(dispatch, "persist", stored)

    return listen


def test_everything_wanted_is_stored(
    new_context: NewContext,
    executor: Executor,
    score_set: str,
    measured: Measured,
    database: Database,
    on_stored: OnStored,
) -> None:
    context = new_context()
    came: list[str] = []
    on_stored(lambda unit, result: came.append(unit.key))
    report = run_units(context, executor, score_set, UNITS, SCORING)
    assert report == Dispatched(measured=5, reused=0)
    assert sorted(came) == sorted(measured()) == sorted(unit.key for unit in UNITS)
    with database.read() as session:
        assert units.keys(session, score_set) == {unit.key for unit in UNITS}
        assert scores.keys(session, score_set) == {
            ("a", "w2", "output_kl"),
            ("a", "w2", "gram_output"),
            ("b", "w4", "output_kl"),
        }
        choosing, reporting = units.list_kind(session, score_set, "measure")
        assert (choosing.unit["assignment"], reporting.unit["assignment"]) == ([["a", "w2"]], [])
        unit = units.get(session, score_set, UNITS[0].key)
    assert unit is not None
    assert (unit.kind, unit.job_id, unit.unit) == ("score", context.job.id, UNITS[0].as_json())


def test_arrays_and_facts_can_be_read_back(
    new_context: NewContext, executor: Executor, score_set: str, on_stored: OnStored
) -> None:
    context = new_context()
    results: dict[str, UnitResult] = {}
    on_stored(lambda unit, result: results.update({unit.key: result}))
    run_units(context, executor, score_set, UNITS, SCORING)
    for key, result in results.items():
        stored = stored_result(context, score_set, key)
        assert stored is not None
        assert stored.facts == result.facts
        assert set(stored.arrays) == set(result.arrays)
        for name, array in result.arrays.items():
            np.testing.assert_array_equal(stored.arrays[name], array)
    assert stored_result(context, score_set, "missing") is None


def test_nothing_is_measured_twice(
    new_context: NewContext, executor: Executor, score_set: str, measured: Measured
) -> None:
    run_units(new_context(), executor, score_set, UNITS[:3], SCORING)
    report = run_units(new_context(), executor, score_set, [*UNITS, *UNITS], SCORING)
    assert report == Dispatched(measured=2, reused=6)
    assert max(Counter(measured()).values()) == 1


def test_only_missing_metrics_are_measured(
    new_context: NewContext, executor: Executor, score_set: str, on_stored: OnStored
) -> None:
    context = new_context()
    run_units(context, executor, score_set, [score("a", "w2", "output_kl")], SCORING)
    seen: list[Unit] = []
    wanted = [score("a", "w2", "output_kl", "sqnr")]
    on_stored(lambda unit, result: seen.append(unit))
    run_units(context, executor, score_set, wanted, SCORING)
    assert seen == [score("a", "w2", "sqnr")]
    assert missing_units(context, score_set, wanted).units == ()
    assert [row.metric for row in stored_scores(context, score_set)] == ["output_kl", "sqnr"]


def test_another_job_may_fill_the_same_set_meanwhile(
    new_context: NewContext, executor: Executor, score_set: str, measured: Measured, on_stored: OnStored
) -> None:
    context, other = new_context(), new_context()
    late = score("late")

    def other_job(unit: Unit, result: UnitResult) -> None:
        persist(
            other, score_set, late, UnitResult(scores=(ScoreRow("late", "w4", "output_kl", 0.5, None, 8),))
        )

    wanted = [*(score(f"l{index}") for index in range(4)), late]
    on_stored(other_job)
    report = run_units(context, executor, score_set, wanted, SCORING)
    assert report == Dispatched(measured=4, reused=1)
    assert late.key not in measured()


def test_progress_counts_what_was_reused(
    new_context: NewContext, executor: Executor, score_set: str, database: Database
) -> None:
    run_units(new_context(), executor, score_set, UNITS[:2], SCORING)
    context = new_context()
    run_units(context, executor, score_set, UNITS, Stage.MEASURING)
    with database.read() as session:
        job = jobs.get(session, context.job.id)
    assert job is not None
    assert (job.stage, job.done, job.total) == (Stage.MEASURING, 5, 5)


def test_a_repetition_that_agrees_is_no_fault(
    new_context: NewContext, score_set: str, database: Database
) -> None:
    context = new_context()
    result = UnitResult(scores=(ScoreRow("a", "w4", "kl", 0.5, None, 8),), arrays={"x": np.arange(3)})
    assert persist(context, score_set, score("a"), result)
    again = UnitResult(scores=result.scores, arrays=result.arrays, facts={"seconds": 2.0})
    assert not persist(context, score_set, score("a"), again)
    with database.read() as session:
        assert units.faults(session, score_set) == ()


@pytest.mark.parametrize(("value", "array"), [(0.6, [0, 1, 2]), (0.5, [0, 1, 3])])
def test_a_repetition_that_disagrees_is_kept_as_a_fault(
    new_context: NewContext, score_set: str, database: Database, value: float, array: list[int]
) -> None:
    context = new_context()
    kept = UnitResult(scores=(ScoreRow("a", "w4", "kl", 0.5, None, 8),), arrays={"x": np.arange(3)})
    other = UnitResult(scores=(ScoreRow("a", "w4", "kl", value, None, 8),), arrays={"x": np.array(array)})
    persist(context, score_set, score("a"), kept)
    persist(context, score_set, score("a"), other)
    with database.read() as session:
        (fault,) = units.faults(session, score_set)
        stored = scores.get(session, score_set, "a", "w4", "kl")
        told = [event.type for event in events.list_after(session, context.job.id)]
    assert stored is not None
    assert stored.value == 0.5
    assert fault.kept != fault.got
    assert told[-1] == "fault"


def test_a_unit_that_raises_fails_the_job_and_names_itself(
    new_context: NewContext, executor: Executor, score_set: str
) -> None:
    context = new_context()
    with pytest.raises(ServiceError, match="The layer must behave") as caught:
        run_units(context, executor, score_set, [score("a"), score("error", "w3")], SCORING)
    problem = caught.value.as_json()
    assert problem["type"].endswith(":unit-error")
    assert (problem["layer"], problem["scheme"]) == ("error", "w3")
    assert len(stored_scores(context, score_set)) == 1


@pytest.mark.parametrize(
    ("layer", "slug", "status"), [("memory", "out-of-memory", 500), ("nonfinite", "non-finite", 422)]
)
def test_other_failures_have_their_own_slug(
    new_context: NewContext, executor: Executor, score_set: str, layer: str, slug: str, status: int
) -> None:
    with pytest.raises(ServiceError) as caught:
        run_units(new_context(), executor, score_set, [score(layer)], SCORING)
    problem = caught.value.as_json()
    assert problem["type"].endswith(f":{slug}")
    assert (problem["status"], problem["layer"]) == (status, layer)


def test_a_number_that_is_not_finite_is_never_stored(new_context: NewContext, score_set: str) -> None:
    class Careless(Scripted):
        def outcome(self, key: str, unit: Unit) -> Outcome:
            row = ScoreRow("a", "w4", "output_kl", float("nan"), None, 8)
            return Outcome(key, result=UnitResult(scores=(row,)))

    context = new_context()
    with pytest.raises(ServiceError, match=r"output_kl of layer a with w4 must be finite\. Got nan"):
        run_units(context, Careless(), score_set, [score("a")], SCORING)
    assert stored_scores(context, score_set) == ()


def test_a_model_that_cannot_be_loaded_fails_the_job_with_its_kind(
    new_context: NewContext, settings: object, spec: SessionSpec, score_set: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    broken = make_executor("local_pool", ExecutorSettings(2, tmp_path, "fake_session:FakeSession"))
    broken.start(replace(spec, model=replace(spec.model, location="broken")))
    with pytest.raises(ServiceError, match="The model must load") as caught:
        run_units(new_context(), broken, score_set, [score("a"), score("b")], SCORING)
    assert caught.value.as_json()["type"].endswith(":bad-model")


class Scripted:
    """An executor whose outcomes tests write."""

    name, capacity = "scripted", 2

    def __init__(self) -> None:
        self.queue: list[tuple[str, Unit]] = []
        self.closed: list[float] = []

    def start(self, spec: SessionSpec) -> None:
        pass

    def submit(self, key: str, unit: Unit) -> None:
        self.queue.append((key, unit))

    def wait(self, timeout: float) -> list[Outcome]:
        return [self.outcome(*self.queue.pop(0))] if self.queue else []

    def outcome(self, key: str, unit: Unit) -> Outcome:
        return Outcome(key, failure=Failure("worker_crash", "dead", {"signal": "SIGKILL"}))

    def close(self, grace_seconds: float = 10.0) -> None:
        self.closed.append(grace_seconds)


def test_three_deaths_fail_the_job_and_keep_the_other_scores(
    new_context: NewContext, score_set: str, pool: Executor, database: Database
) -> None:
    context = new_context(lambda settings: pool)
    wanted = [score("kill"), *(score(f"l{index}") for index in range(20))]
    with pytest.raises(ServiceError) as caught:
        run_units(context, pool, score_set, wanted, SCORING)
    problem = caught.value.as_json()
    assert problem["type"].endswith(":worker-crash")
    assert (problem["layer"], problem["attempts"]) == ("kill", 3)
    with database.read() as session:
        (record,) = attempts.list_job(session, context.job.id)
    assert record.attempts == 3
    assert {row.layer for row in stored_scores(context, score_set)} >= {"l0", "l1"}


def test_deaths_are_counted_over_runners(new_context: NewContext, score_set: str, database: Database) -> None:
    context = new_context()
    with database.write() as session:
        for _ in range(2):
            attempts.add(session, context.job.id, score("a").key, {})
    scripted = Scripted()
    with pytest.raises(ServiceError) as caught:
        run_units(context, scripted, score_set, [score("a")], SCORING)
    assert caught.value.extra["attempts"] == 3


def test_a_worker_that_dies_once_costs_nothing_but_time(
    new_context: NewContext, pool: Executor, score_set: str, measured: Measured, tmp_path: Path
) -> None:
    fatal = score(f"kill_once:{tmp_path / 'marker'}")
    others = [score(f"l{index}") for index in range(10)]
    report = run_units(new_context(), pool, score_set, [fatal, *others], SCORING)
    assert report == Dispatched(measured=11, reused=0)
    counts = Counter(measured())
    assert counts.pop(fatal.key) == 2
    assert set(counts.values()) == {1}


def test_a_cancelled_dispatch_keeps_what_ends_within_the_grace(
    new_context: NewContext, pool: Executor, score_set: str, database: Database, on_stored: OnStored
) -> None:
    context = new_context()

    def cancel(unit: Unit, result: UnitResult) -> None:
        with database.write() as session:
            jobs.request_cancel(session, context.job.id)
        context.event("seen", {})

    wanted = [score("first"), score("sleep:1"), *(score(f"sleep:9{index}") for index in range(9))]
    on_stored(cancel)
    with pytest.raises(Cancelled):
        run_units(context, pool, score_set, wanted, SCORING)
    assert {row.layer for row in stored_scores(context, score_set)} >= {"first", "sleep:1"}


def test_a_stopping_runner_leaves_the_dispatch(
    new_context: NewContext, executor: Executor, score_set: str, stop: threading.Event, on_stored: OnStored
) -> None:
    context = new_context()
    on_stored(lambda unit, result: stop.set())
    with pytest.raises(ShuttingDown):
        run_units(context, executor, score_set, UNITS, SCORING)
    assert 0 < len(stored_scores(context, score_set)) < 3


def test_a_lost_lease_stores_nothing_more(
    new_context: NewContext, executor: Executor, score_set: str, database: Database, on_stored: OnStored
) -> None:
    from service.db.repositories import leases

    context = new_context()

    def overtake(unit: Unit, result: UnitResult) -> None:
        with database.write() as session:
            leases.heartbeat(session, context.job.id, context.epoch, -1)
            leases.claim(session, leases.Owner("other", "x", 1, "p"), 60)

    on_stored(overtake)
    with pytest.raises(LeaseLost):
        run_units(context, executor, score_set, UNITS, SCORING)
    with database.read() as session:
        assert len(units.keys(session, score_set)) == 1


def test_run_alone_gives_the_outcome_and_stores_nothing(
    new_context: NewContext, spec: SessionSpec, score_set: str
) -> None:
    context = new_context()
    good = run_alone(context, spec, score("a"))
    assert good.result is not None
    assert good.result.scores[0].layer == "a"
    bad = run_alone(context, spec, score("error"))
    assert bad.failure is not None
    assert bad.failure.kind == "unit_error"
    other = run_alone(context, spec, score("a"), session_factory="fake_session:environment_of_worker")
    assert other.result is not None
    assert "pid" in other.result.facts
    assert stored_scores(context, score_set) == ()


def test_run_alone_gives_up_after_three_deaths(new_context: NewContext, spec: SessionSpec) -> None:
    scripted = Scripted()
    outcome = run_alone(new_context(lambda settings: scripted), spec, score("kill"))
    assert outcome.failure is not None
    assert outcome.failure.kind == "worker_crash"
    assert scripted.closed == [0]


def test_every_kind_of_unit_has_its_failpoint() -> None:
    assert [dispatch.place_of(unit) for unit in UNITS] == [
        "runner.scoring",
        "runner.scoring",
        "runner.scoring",
        "runner.choosing",
        "runner.reporting",
    ]


@pytest.mark.parametrize("wrong", ["another layer", "nothing"])
def test_a_result_that_answers_another_question_is_tried_again_and_never_stored(
    new_context: NewContext, score_set: str, wrong: str
) -> None:
    class LostStep(Scripted):
        times = 0

        def outcome(self, key: str, unit: Unit) -> Outcome:
            LostStep.times += 1
            layer = "a" if LostStep.times == 3 else "b"
            row = ScoreRow(layer, "w4", "output_kl", 0.5, None, 8)
            return Outcome(
                key, result=UnitResult(scores=(row,) if layer == "a" or wrong != "nothing" else ())
            )

    context = new_context()
    assert run_units(context, LostStep(), score_set, [score("a")], SCORING) == Dispatched(1, 0)
    assert [row.layer for row in stored_scores(context, score_set)] == ["a"]

    LostStep.times = 10
    with pytest.raises(
        ServiceError, match="must have the scores c w4 output_kl. Got (b w4 output_kl|none)"
    ) as end:
        run_units(context, LostStep(), score_set, [score("c")], SCORING)
    assert end.value.as_json()["type"].endswith(":worker-crash")
    assert end.value.as_json()["attempts"] == 3
