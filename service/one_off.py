"""Measurements by one worker that are stored nowhere: dry runs, evaluations, models from factories."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sensitivity.evidence import quality_interval
from sensitivity.spec import SessionSpec
from sensitivity.units import InspectUnit, MeasureUnit, Unit, UnitResult
from service.executors.catalog import make_executor
from service.executors.isolation import isolation_of
from service.executors.protocol import ExecutorSettings, Outcome
from service.executors.ray_settings import ray_of
from service.runner.problems import problem_of_failure
from service.settings import Settings

WAIT_SECONDS = 0.5


def inspect(settings: Settings, spec: SessionSpec, session_factory: str | None = None) -> Mapping[str, Any]:
    """What one worker sees in model and data: inventory, task, samples. Raises ServiceError."""
    unit = InspectUnit(spec.include, spec.exclude)
    return run_units(settings, spec, [unit], session_factory)[0].facts


def measure(
    settings: Settings,
    spec: SessionSpec,
    plans: Sequence[Mapping[str, str]],
    corrections: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Divergence and quality of whole plans on all of the data, with 95 % intervals; {} is full precision.

    Raises ServiceError.
    """
    units = [MeasureUnit(tuple(plan.items()), "all", tuple(corrections)) for plan in plans]
    return [_intervals(result.arrays) for result in run_units(settings, spec, units)]


def run_units(
    settings: Settings,
    spec: SessionSpec,
    units: Sequence[Unit],
    session_factory: str | None = None,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[UnitResult]:
    """The results of a few units, in their order; `on_done` is told how many there are after each.

    Raises ServiceError for the first unit that has none.
    """
    with tempfile.TemporaryDirectory(prefix="bitplan-", ignore_cleanup_errors=True) as folder:
        log = Path(folder)
        factory = session_factory or settings.session_factory
        chosen = ExecutorSettings(1, log, factory, isolation_of(settings), ray=ray_of(settings))
        executor = make_executor(settings.executor, chosen)
        executor.start(spec)
        try:
            for unit in units:
                executor.submit(unit.key, unit)
            outcomes: dict[str, Outcome] = {}
            while len(outcomes) < len({unit.key for unit in units}):
                outcomes |= {outcome.key: outcome for outcome in executor.wait(WAIT_SECONDS)}
                on_done(len(outcomes))
                if any(outcome.failure is not None for outcome in outcomes.values()):
                    break
        finally:
            executor.close(0)
    failed = [unit for unit in units if unit.key in outcomes and outcomes[unit.key].failure is not None]
    return [_result(outcomes[unit.key], unit) for unit in failed or units]


def _result(outcome: Outcome, unit: Unit) -> UnitResult:
    if outcome.failure is not None:
        raise problem_of_failure(outcome.failure, unit.as_json())
    assert outcome.result is not None
    return outcome.result


def _intervals(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    found = {name: quality_interval(name, values).as_json() for name, values in arrays.items()}
    return {"divergence": found.pop("divergence"), "quality": found, "samples": len(arrays["divergence"])}
