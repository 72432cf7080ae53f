"""Measure what is missing: units go to an executor, each result is stored in its own fenced transaction."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from sensitivity.spec import SessionSpec
from sensitivity.units import MeasureUnit, ScoreUnit, Unit, UnitResult, misfit
from service import metrics
from service.db.repositories import attempts, events, scores, units
from service.executors.protocol import Executor, Failure, Outcome
from service.failpoints import failpoint
from service.records import ScoreRecord, UnitRecord
from service.runner.context import JobContext
from service.runner.problems import problem_of_failure
from service.runner.signals import Interruption, LeaseLost
from service.states import Stage

DEATHS = 3
QUEUED_PER_WORKER = 2
WAIT_SECONDS = 0.5

log = structlog.get_logger()


@dataclass(frozen=True)
class Span:
    """Where a call stands in a stage of several calls: units before it, and units of the whole stage."""

    before: int = 0
    total: int = 0


@dataclass(frozen=True)
class Dispatched:
    """How many units were measured now, and how many were stored before."""

    measured: int
    reused: int


def run_units(
    context: JobContext,
    executor: Executor,
    score_set: str,
    wanted: Iterable[Unit],
    stage: Stage,
    *,
    span: Span = Span(),
) -> Dispatched:
    """Have every unit of `wanted` stored in `score_set` (which must exist), measuring only what is missing.

    executor    started; the caller closes it. After any exception it is closed
    span        what progress is counted in, when the stage has several calls

    A worker that dies costs its unit an attempt (counted in the database, per job); after three the job
    fails as worker-crash. A unit that raises fails the job at once, with its layer and scheme in the
    problem. In both cases, and when the job is cancelled or the runner stops, units that end within the
    grace are still stored.

    Raises `ServiceError` for failures, and what `context.check` raises.
    """
    missing = missing_units(context, score_set, wanted)
    metrics.UNITS.labels("reused").inc(missing.reused)
    dispatch = _Dispatch(context, executor, score_set, missing, stage, span=span)
    dispatch.run()
    return Dispatched(dispatch.measured, dispatch.reused)


def run_alone(
    context: JobContext,
    spec: SessionSpec,
    unit: Unit,
    session_factory: str | None = None,
    workers: int | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    writable: tuple[Path, ...] = (),
) -> Outcome:
    """Run one unit in a fresh executor and give its outcome, which is stored nowhere. `meanwhile` is called
    every half second; the unit may write into the `writable` folders.

    A worker that dies is tried again, three times in all, counted in the database; what comes then, and any
    other failure, is the outcome's `failure`. Raises what `context.check` raises.
    """
    executor = context.executor(spec, session_factory, workers, writable)
    try:
        while True:
            outcome = _one_outcome(context, executor, unit, meanwhile)
            if outcome.failure is None or outcome.failure.kind != "worker_crash":
                return outcome
            if count_death(context, unit, outcome.failure) >= DEATHS:
                return outcome
    finally:
        executor.close(0)


def _one_outcome(
    context: JobContext, executor: Executor, unit: Unit, meanwhile: Callable[[], None]
) -> Outcome:
    began = time.perf_counter()
    executor.submit(unit.key, unit)
    while True:
        context.check()
        meanwhile()
        outcomes = executor.wait(WAIT_SECONDS)
        context.tell_gaps()
        for outcome in outcomes:
            _count_outcome(outcome, unit, began)
            return outcome


def count_death(context: JobContext, unit: Unit, failure: Failure) -> int:
    """Count one more worker that died of this unit in this job; how many there were."""
    record = context.write(lambda session: attempts.add(session, context.job.id, unit.key, failure.as_json()))
    metrics.WORKER_DEATHS.inc()
    log.warning(
        "dispatch.worker_crash",
        key=unit.key,
        attempts=record.attempts,
        how=failure.message,
        log=failure.detail.get("log"),
    )
    return record.attempts


@dataclass(frozen=True)
class Missing:
    """What is left to measure, each unit once, and how many units need no measuring."""

    units: tuple[Unit, ...]
    reused: int


def missing_units(context: JobContext, score_set: str, wanted: Iterable[Unit]) -> Missing:
    """The set difference of what is wanted and what is stored; a `ScoreUnit` shrinks to its missing
    metrics.
    """
    keys = context.read(lambda session: units.keys(session, score_set))
    known = context.read(lambda session: scores.keys(session, score_set))
    left: dict[str, Unit] = {}
    reused = 0
    for unit in wanted:
        rest = _rest(unit, keys, known)
        if rest is None:
            reused += 1
        else:
            left.setdefault(rest.key, rest)
    return Missing(tuple(left.values()), reused)


def _rest(unit: Unit, keys: frozenset[str], known: frozenset[scores.ScoreKey]) -> Unit | None:
    if unit.key in keys:
        return None
    if not isinstance(unit, ScoreUnit):
        return unit
    metrics = tuple(name for name in unit.metrics if (unit.layer, unit.scheme, name) not in known)
    return replace(unit, metrics=metrics) if metrics else None


def stored_result(context: JobContext, score_set: str, key: str) -> UnitResult | None:
    """The facts and arrays of a stored unit, without its scores; None when it is not stored."""
    record = context.read(lambda session: units.get(session, score_set, key))
    return None if record is None else result_of(context, record)


def result_of(context: JobContext, record: UnitRecord) -> UnitResult:
    """The facts of a unit record with its arrays from the store."""
    arrays = {} if record.artifact is None else context.store.get_arrays(record.artifact)
    return UnitResult(arrays=arrays, facts=record.facts)


class _Dispatch:
    """One call of `run_units`."""

    def __init__(
        self,
        context: JobContext,
        executor: Executor,
        score_set: str,
        missing: Missing,
        stage: Stage,
        *,
        span: Span,
    ):
        self._context, self._executor, self._score_set = context, executor, score_set
        self._waiting = deque(missing.units)
        self._stage, self._before = stage, span.before
        self._total = max(span.total, span.before + len(missing.units) + missing.reused)
        self._flying: dict[str, Unit] = {}
        self._submitted: dict[str, float] = {}
        self._finished: dict[str, Unit] = {}
        self.measured, self.reused = 0, missing.reused

    def run(self) -> None:
        """Until nothing is waiting or in flight."""
        try:
            self._report()
            while self._waiting or self._flying:
                self._context.check()
                self._refill()
                outcomes = self._executor.wait(WAIT_SECONDS) if self._flying else []
                self._context.tell_gaps()
                for outcome in outcomes:
                    self._take(outcome)
        except LeaseLost:
            self._executor.close(0)
            raise
        except (Interruption, _UnitFailed) as stop:
            self._salvage()
            raise (stop.problem if isinstance(stop, _UnitFailed) else stop) from None

    def _refill(self) -> None:
        while self._waiting and len(self._flying) < self._executor.capacity * QUEUED_PER_WORKER:
            unit = self._waiting.popleft()
            if self._stored_meanwhile(unit):
                self.reused += 1
                metrics.UNITS.labels("reused").inc()
                continue
            self._flying[unit.key] = unit
            self._submitted[unit.key] = time.perf_counter()
            log.debug("dispatch.unit", key=unit.key)
            self._executor.submit(unit.key, unit)

    def _stored_meanwhile(self, unit: Unit) -> bool:
        """Another job of the tenant may fill the same score set at this moment."""
        found = self._context.read(lambda session: units.get(session, self._score_set, unit.key))
        return found is not None

    def _take(self, outcome: Outcome) -> None:
        """Store a result; an outcome that comes twice is compared with what was stored."""
        first = outcome.key in self._flying
        if first:
            _count_outcome(outcome, self._flying[outcome.key], self._submitted.pop(outcome.key))
        unit = self._flying.pop(outcome.key, None) or self._finished.get(outcome.key)
        if unit is None:
            log.warning("dispatch.unknown_outcome", key=outcome.key)
            return
        failure = failure_in(outcome, unit)
        if failure is None and outcome.result is not None:
            self._store(unit, outcome.result, first)
        elif failure is not None and first:
            self._fail(unit, failure)

    def _store(self, unit: Unit, result: UnitResult, first: bool) -> None:
        failpoint("runner.before_store")
        require_finite(unit, result)
        persist(self._context, self._score_set, unit, result)
        failpoint("runner.after_store")
        failpoint(place_of(unit))
        self._finished[unit.key] = unit
        if first:
            self.measured += 1
            self._report()

    def _report(self) -> None:
        done = self._before + self.measured + self.reused
        self._context.report_progress(self._stage, done, self._total)

    def _fail(self, unit: Unit, failure: Failure) -> None:
        if failure.kind != "worker_crash":
            raise _UnitFailed(unit, failure, 1)
        deaths = count_death(self._context, unit, failure)
        if deaths >= DEATHS:
            raise _UnitFailed(unit, failure, deaths)
        self._waiting.append(unit)

    def _salvage(self) -> None:
        """Keep the results of the units that end within the grace."""
        self._executor.close(self._context.settings.grace_seconds)
        for outcome in self._executor.wait(0):
            if outcome.result is not None:
                self._take(outcome)


def failure_in(outcome: Outcome, unit: Unit) -> Failure | None:
    """Why there is no result to store: the worker's word, or that it answers another question, as one does
    that is broken or hostile. The unit may be tried again then.
    """
    if outcome.result is None or (wrong := misfit(unit, outcome.result)) is None:
        return outcome.failure
    log.warning("dispatch.misfit", key=unit.key, why=wrong)
    return Failure("worker_crash", wrong, {"error": "Misfit"})


def _count_outcome(outcome: Outcome, unit: Unit, submitted: float) -> None:
    kind = str(unit.as_json()["unit"])
    metrics.UNIT_SECONDS.labels(kind).observe(time.perf_counter() - submitted)
    metrics.UNITS.labels("measured" if outcome.failure is None else "failed").inc()


class _UnitFailed(Exception):  # noqa: N818 - carries the problem to the end of the dispatch
    def __init__(self, unit: Unit, failure: Failure, tries: int):
        super().__init__(failure.message)
        self.problem = problem_of_failure(failure, unit.as_json(), tries)


def place_of(unit: Unit) -> str:
    """The failpoint that stands behind the storing of a unit of this kind."""
    return f"runner.{unit.part}" if isinstance(unit, MeasureUnit) else "runner.scoring"


def require_finite(unit: Unit, result: UnitResult) -> None:
    """NaN and infinity never become scores: raises the failure that names layer, scheme and metric."""
    for row in result.scores:
        if not (math.isfinite(row.value) and math.isfinite(row.stderr or 0.0)):
            message = f"{row.metric} of layer {row.layer} with {row.scheme} must be finite. Got {row.value}."
            raise _UnitFailed(unit, Failure("unit_error", message, {"error": "non_finite"}), 1)


def persist(context: JobContext, score_set: str, unit: Unit, result: UnitResult) -> bool:
    """Store one result: arrays as a blob, then unit and scores in one fenced transaction. True if the unit
    is new.

    What is stored stays; a repetition that gives other scores or arrays is kept as a fault.
    """
    artifact = context.store.put_arrays(result.arrays) if result.arrays else None
    failpoint("runner.artifact_written")
    record = _UnitToStore(context.job.id, score_set, unit, result, artifact)
    return context.write(record.insert)


@dataclass(frozen=True)
class _UnitToStore:
    job_id: str
    score_set: str
    unit: Unit
    result: UnitResult
    artifact: str | None

    def insert(self, session: Session) -> bool:
        document = self.unit.as_json()
        new = units.insert(
            session,
            score_set=self.score_set,
            key=self.unit.key,
            kind=str(document["unit"]),
            unit=document,
            facts=self.result.facts,
            artifact=self.artifact,
            job_id=self.job_id,
        )
        disagreeing = scores.insert(session, self._records())
        kept = units.get(session, self.score_set, self.unit.key)
        if kept is not None and (disagreeing or kept.artifact != self.artifact):
            self._keep_fault(session, kept, disagreeing)
        return new

    def _records(self) -> list[ScoreRecord]:
        return [
            ScoreRecord(
                score_set=self.score_set,
                layer=row.layer,
                scheme=row.scheme,
                metric=row.metric,
                value=row.value,
                stderr=row.stderr,
                samples=row.samples,
                unit_key=self.unit.key,
            )
            for row in self.result.scores
        ]

    def _keep_fault(self, session: Session, kept: UnitRecord, disagreeing: Iterable[ScoreRecord]) -> None:
        stored = [
            scores.get(session, self.score_set, row.layer, row.scheme, row.metric) for row in disagreeing
        ]
        fault = units.add_fault(
            session,
            score_set=self.score_set,
            unit_key=self.unit.key,
            kept={"artifact": kept.artifact, "scores": [_score_json(row) for row in stored if row]},
            got={"artifact": self.artifact, "scores": [_score_json(row) for row in disagreeing]},
        )
        events.append(session, self.job_id, "fault", {"fault": fault.id, "unit": self.unit.key})


def _score_json(row: ScoreRecord) -> Mapping[str, Any]:
    return {
        "layer": row.layer,
        "scheme": row.scheme,
        "metric": row.metric,
        "value": row.value,
        "stderr": row.stderr,
        "samples": row.samples,
    }
