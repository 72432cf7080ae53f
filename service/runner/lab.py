"""A job's measurements: from the database where they are stored, else by workers, which start when first
needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quant.digest import digest
from quant.layers import Inventory
from search.compile import Assignment
from search.refine import Measured
from sensitivity.catalog import SCORERS
from sensitivity.spec import SessionSpec
from sensitivity.units import BlockPlan, InspectUnit, MeasureUnit, ScoreRow, ScoreUnit, Unit
from service.db.repositories import scores, units
from service.records import ScoreRecord, UnitRecord
from service.runner.context import JobContext
from service.runner.dispatch import Span, run_units
from service.states import Stage

Choices = Mapping[str, Sequence[str]]
"""Layer -> the schemes that are to be scored there."""


Part = Literal["choosing", "reporting"]


class Lab:
    """One session's measurements for one job. Use it as a context manager: it stops its workers.

    Whole plans, uniform ones too, are measured with the `corrections`; scores of single layers without.
    """

    def __init__(self, context: JobContext, spec: SessionSpec, corrections: tuple[str, ...] = ()) -> None:
        self._context, self.spec, self._corrections = context, spec, corrections
        self._executor = context.executor(spec)
        self.score_set, settings = score_set_of(spec, context.job.tenant)
        context.open_score_set(self.score_set, settings)
        self._done: Counter[Stage] = Counter()
        self._expected: dict[Stage, int] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.close(self._context.settings.grace_seconds if kind is None else 0.0)

    def expect(self, stage: Stage, total: int) -> None:
        """Say how many units a stage of several calls will have at most, for its progress."""
        self._expected[stage] = total

    def inspect(self) -> Mapping[str, Any]:
        """What the workers see in model and data: inventory, task, sample counts, offered metrics."""
        unit = InspectUnit(self.spec.include, self.spec.exclude)
        return self._results([unit], Stage.LOADING)[unit.key].facts

    def score(self, choices: Choices, metrics: Sequence[str], samples: int) -> None:
        """Store every metric of every choice that is not stored yet."""
        single = tuple(name for name in metrics if SCORERS[name].unit == "choice")
        missing = self._missing(choices, single)
        self._run(
            [ScoreUnit(layer, scheme, names) for (layer, scheme), names in missing.items()], Stage.SCORING
        )
        for metric in metrics:
            if metric not in single and self._missing(choices, (metric,)):
                self._score_in_blocks(metric, choices, samples)

    def scores(self, metrics: Collection[str]) -> tuple[ScoreRecord, ...]:
        """The stored scores of some metrics."""
        with self._context.database.read() as session:
            return scores.list_all(session, self.score_set, metrics)

    def sketches(self, choices: Choices) -> dict[tuple[str, str], NDArray[np.float32]]:
        """(layer, scheme) -> the stored change of the outputs, for the quadratic model."""
        with self._context.database.read() as session:
            records = scores.list_all(session, self.score_set, ["gram_output"])
            wanted = {(layer, scheme) for layer, names in choices.items() for scheme in names}
            found = {(r.layer, r.scheme): units.get(session, self.score_set, r.unit_key) for r in records}
        return {
            cell: self._context.store.get_arrays(unit.artifact)["sketch"]
            for cell, unit in found.items()
            if cell in wanted and unit is not None and unit.artifact is not None
        }

    def products(self, choices: Choices, samples: int) -> dict[tuple[str, str], NDArray[np.float64]]:
        """(layer, scheme) -> its vector of the factor that `gram_fisher` models any plan with."""
        plan, done = self._blocks("gram_fisher", choices, samples)
        factor = SCORERS["gram_fisher"].load().factor(plan, done)
        return {
            (layer, scheme): factor[i, j]
            for i, layer in enumerate(plan.layers)
            for j, scheme in enumerate(plan.schemes)
            if scheme in choices[layer]
        }

    def measure(self, assignments: Sequence[Assignment], part: Part, stage: Stage) -> list[Measured]:
        """The divergence of whole plans from full precision, in the order of the plans."""
        return [measured for measured, _ in self.quality(assignments, part, stage)]

    def quality(
        self, assignments: Sequence[Assignment], part: Part, stage: Stage
    ) -> list[tuple[Measured, dict[str, NDArray[np.float64]]]]:
        """As `measure`, each with the per-sample quality by name (perplexity, accuracy ...)."""
        wanted = [MeasureUnit(tuple(plan.items()), part, self._corrections) for plan in assignments]
        results = self._results(wanted, stage)
        return [_measured(self._context.store.get_arrays(str(results[unit.key].artifact))) for unit in wanted]

    def _score_in_blocks(self, metric: str, choices: Choices, samples: int) -> None:
        """Blocks until the metric's own stopping rule is content, then its rows, all at once."""
        scorer = SCORERS[metric].load()
        plan, done = self._blocks(metric, choices, samples)
        rows = [row for row in scorer.combine(plan, done) if row.scheme in choices[row.layer]]
        self._store(rows, f"combined:{metric}")

    def _blocks(
        self, metric: str, choices: Choices, samples: int
    ) -> tuple[BlockPlan, dict[str, Mapping[str, NDArray[Any]]]]:
        """Every block that a metric wants, from the database or measured now."""
        scorer = SCORERS[metric].load()
        schemes = tuple(dict.fromkeys(scheme for names in choices.values() for scheme in names))
        plan = BlockPlan(tuple(choices), schemes, samples, self.spec)
        done: dict[str, Mapping[str, NDArray[Any]]] = {}
        while blocks := scorer.blocks(plan, done):
            for key, record in self._results(blocks, Stage.SCORING).items():
                done[key] = {} if record.artifact is None else self._context.store.get_arrays(record.artifact)
        return plan, done

    def _store(self, rows: Sequence[ScoreRow], unit_key: str) -> None:
        records = [ScoreRecord(self.score_set, unit_key=unit_key, **vars(row)) for row in rows]
        self._context.write(lambda session: scores.insert(session, records))

    def _missing(self, choices: Choices, metrics: Sequence[str]) -> dict[tuple[str, str], tuple[str, ...]]:
        """(layer, scheme) -> the metrics that have no stored score there."""
        with self._context.database.read() as session:
            stored = scores.keys(session, self.score_set)
        cells = [(layer, scheme) for layer, names in choices.items() for scheme in names]
        found = {cell: tuple(name for name in metrics if (*cell, name) not in stored) for cell in cells}
        return {cell: names for cell, names in found.items() if names}

    def _results(self, wanted: Sequence[Unit], stage: Stage) -> dict[str, UnitRecord]:
        """The stored results of units, run now where there are none."""
        self._run(wanted, stage)
        with self._context.database.read() as session:
            found = {unit.key: units.get(session, self.score_set, unit.key) for unit in wanted}
        return {key: record for key, record in found.items() if record is not None}

    def _run(self, wanted: Sequence[Unit], stage: Stage) -> None:
        span = Span(self._done[stage], self._expected.get(stage, 0))
        run_units(self._context, self._executor, self.score_set, wanted, stage, span=span)
        self._done[stage] += len(wanted)


def score_set_of(spec: SessionSpec, tenant: str = "default") -> tuple[str, dict[str, Any]]:
    """The digest of the score set that sessions of `spec` fill, and the settings it is the digest of."""
    settings = {"tenant": tenant, **spec.score_settings()}
    return digest(settings), settings


def inventory_of(inspection: Mapping[str, Any]) -> Inventory:
    """The layers that an inspection found."""
    return Inventory.from_json(dict(inspection["inventory"]))


def _measured(arrays: Mapping[str, NDArray[Any]]) -> tuple[Measured, dict[str, NDArray[np.float64]]]:
    divergence = np.asarray(arrays["divergence"], dtype=np.float64)
    stderr = float(divergence.std(ddof=1) / np.sqrt(len(divergence))) if len(divergence) > 1 else float("nan")
    quality = {name: np.asarray(values) for name, values in arrays.items() if name != "divergence"}
    return Measured(float(divergence.mean()), stderr, divergence), quality
