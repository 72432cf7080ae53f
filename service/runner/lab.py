"""A job's measurements: from the database where they are stored, else by workers, which start when first
needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from quant.digest import digest
from quant.kv_cache import FULL, cache_scheme
from quant.layers import Inventory
from search.compile import Assignment
from search.refine import Measured
from sensitivity.catalog import SCORERS
from sensitivity.contexts import without_context
from sensitivity.spec import SessionSpec
from sensitivity.units import (
    BlockPlan,
    BlockUnit,
    InspectUnit,
    MeasureUnit,
    ScoreRow,
    ScoreUnit,
    Unit,
    unit_from_json,
)
from service.db.repositories import scores, units
from service.db.repositories.scores import ScoreKey
from service.draws import COMBINED, Draws, combined
from service.records import ScoreRecord, UnitRecord
from service.runner.columns import Stored, joined, matching, missing_part
from service.runner.context import JobContext
from service.runner.dispatch import Span, run_units
from service.runner.finished import Finished
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
        self._inspection: Mapping[str, Any] | None = None

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
        if self._inspection is None:
            unit = InspectUnit(self.spec.include, self.spec.exclude)
            self._inspection = self._results([unit], Stage.LOADING)[unit.key].facts
        return self._inspection

    def score(self, choices: Choices, metrics: Mapping[str, Sequence[str]], samples: int) -> None:
        """Store every metric of every choice that is not stored yet; `metrics` are those of each layer."""
        missing = self._missing(
            choices, {layer: _of_unit("choice", names) for layer, names in metrics.items()}
        )
        self._run(
            [ScoreUnit(layer, scheme, names) for (layer, scheme), names in missing.items()], Stage.SCORING
        )
        for metric in dict.fromkeys(name for names in metrics.values() for name in _of_unit("block", names)):
            own = {layer: names for layer, names in choices.items() if metric in metrics[layer]}
            if self._missing(own, dict.fromkeys(own, (metric,))):
                self._score_in_blocks(metric, own, samples)

    def scores(self, metrics: Collection[str]) -> tuple[ScoreRecord, ...]:
        """The stored scores of some metrics."""
        return self._context.read(lambda session: scores.list_all(session, self.score_set, metrics))

    def notes(self, layers: Collection[str], metrics: Collection[str]) -> list[str]:
        """What the metrics could not do for some of the layers, and what they did instead."""
        blocks, choices = self._units_of("block"), self._units_of("score")
        looked_at = [unit for unit in blocks if unit.unit["metric"] in metrics]
        looked_at += [unit for unit in choices if set(unit.unit["metrics"]) & set(metrics)]
        found = [note for unit in looked_at for note in notes_of(unit)]
        return list(dict.fromkeys(note["text"] for note in found if note["layer"] in layers))

    def complete(self, choices: Choices) -> tuple[str, ...]:
        """The metrics that are stored for every choice, in catalog order."""
        stored = self._stored_keys()
        cells = [(layer, scheme) for layer, names in choices.items() for scheme in names]
        return tuple(name for name in SCORERS if all((*cell, name) in stored for cell in cells))

    def work(self) -> dict[str, float]:
        """Forward passes that this job took so far, by stage."""
        return self._context.read(lambda session: units.work(session, self.score_set, self._context.job.id))

    def spent(self, records: Sequence[ScoreRecord]) -> float | None:
        """What scores of one metric cost, in forward passes of one sample; None where that was not kept.

        Metrics of single choices that share a pass all count it; one that looks at no samples costs none.
        """
        if not any(record.samples for record in records):
            return 0.0
        keys = {record.unit_key for record in records}
        found = self._stored_units(keys)
        spent = sum(unit.facts.get("forwards", 0) for unit in found.values())
        return float(spent) if len(found) == len(keys) else None

    def draws(self) -> Draws:
        """Reads the independent values behind this session's stored scores."""

        def unit(key: str) -> UnitRecord | None:
            return self._context.read(lambda session: units.get(session, self.score_set, key))

        return Draws(unit, self._context.store.get_array)

    def sketches(self, choices: Choices) -> dict[tuple[str, str], NDArray[np.float32]]:
        """(layer, scheme) -> the stored change of the outputs, for the quadratic model."""
        wanted = {(layer, scheme) for layer, names in choices.items() for scheme in names}
        keys = {
            (record.layer, record.scheme): record.unit_key
            for record in self.scores(["gram_output"])
            if (record.layer, record.scheme) in wanted
        }
        found = self._stored_units(keys.values())
        artifacts = {key: unit.artifact for key, unit in found.items() if unit.artifact is not None}
        return {
            cell: self._context.store.get_arrays(artifacts[key])["sketch"]
            for cell, key in keys.items()
            if key in artifacts
        }

    def products(
        self, metric: str, choices: Choices, samples: int
    ) -> dict[tuple[str, str], NDArray[np.float64]]:
        """(layer, scheme) -> its vector of the factor that a block metric models any plan with."""
        plan, done, _ = self._blocks(metric, choices, samples)
        factor = SCORERS[metric].load().factor(plan, done)
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
        wanted = [MeasureUnit(_changed(plan), part, self._corrections) for plan in assignments]
        results = self._results(wanted, stage)
        return [_measured(self._context.store.get_arrays(str(results[unit.key].artifact))) for unit in wanted]

    def _score_in_blocks(self, metric: str, choices: Choices, samples: int) -> None:
        """Blocks until the metric's own stopping rule is content, then its rows, all at once."""
        scorer = SCORERS[metric].load()
        plan, done, used = self._blocks(metric, choices, samples)
        rows = [row for row in scorer.combine(plan, done) if row.scheme in choices[row.layer]]
        self._store(metric, rows, used)

    def _blocks(self, metric: str, choices: Choices, samples: int) -> tuple[BlockPlan, Finished, set[str]]:
        """Every block that a metric wants, from the database or measured now, and the keys of the units that
        they come from.
        """
        scorer = SCORERS[metric].load()
        plan = block_plan(choices, samples, self.spec, self.inspect())
        done = Finished(self._context.store.get_arrays)
        used: set[str] = set()
        while blocks := scorer.blocks(plan, done):
            if getattr(scorer, "judges_alone", False):
                used |= self._lent(blocks, done)
                continue
            for key, record in self._results(blocks, Stage.SCORING).items():
                done.store(key, record.artifact)
                used.add(key)
        return plan, done, used

    def _lent(self, blocks: Sequence[BlockUnit], done: Finished) -> set[str]:
        """Put blocks into `done`, measuring only the layers and schemes that no stored block holds."""
        stored = self._stored_blocks(blocks[0].metric)
        parts = [missing_part(unit, stored) for unit in blocks]
        if any(parts):
            self._run([part for part in parts if part is not None], Stage.SCORING)
            stored = self._stored_blocks(blocks[0].metric)
        used = set()
        for unit in blocks:
            found = matching(unit, stored)
            exact = [one for one in found if one.unit == unit]
            arrays = [(one.unit, self._context.store.get_arrays(one.artifact)) for one in exact or found]
            done.put(unit.key, joined(unit, arrays))
            used |= {one.unit.key for one in exact or found}
        return used

    def _stored_blocks(self, metric: str) -> list[Stored]:
        found = [(unit_from_json(record.unit), record.artifact) for record in self._units_of("block")]
        return [
            Stored(unit, artifact)
            for unit, artifact in found
            if isinstance(unit, BlockUnit) and unit.metric == metric and artifact is not None
        ]

    def _store(self, metric: str, rows: Sequence[ScoreRow], blocks: Collection[str]) -> None:
        """A block metric's rows with the draws behind them, and what its blocks (keys of units) cost."""
        made = combined(metric, rows)
        artifact = self._context.store.put_arrays(made.arrays) if made.arrays else None
        records = [
            ScoreRecord(
                self.score_set, row.layer, row.scheme, metric, row.value, row.stderr, row.samples, made.key
            )
            for row in rows
        ]

        def insert(session: Session) -> None:
            parts = units.get_many(session, self.score_set, blocks)
            forwards = sum(part.facts.get("forwards", 0) for part in parts.values())
            units.insert(
                session,
                score_set=self.score_set,
                key=made.key,
                kind=COMBINED,
                unit=made.as_json(),
                facts={"forwards": forwards},
                artifact=artifact,
                job_id=self._context.job.id,
            )
            scores.insert(session, records)

        self._context.write(insert)

    def _missing(
        self, choices: Choices, metrics: Mapping[str, Sequence[str]]
    ) -> dict[tuple[str, str], tuple[str, ...]]:
        """(layer, scheme) -> the metrics of the layer that have no stored score there."""
        stored = self._stored_keys()
        cells = [(layer, scheme) for layer, names in choices.items() for scheme in names]
        found = {
            cell: tuple(name for name in metrics[cell[0]] if (*cell, name) not in stored) for cell in cells
        }
        return {cell: names for cell, names in found.items() if names}

    def _results(self, wanted: Sequence[Unit], stage: Stage) -> dict[str, UnitRecord]:
        """The stored results of units, run now where there are none."""
        self._run(wanted, stage)
        return self._stored_units([unit.key for unit in wanted])

    def _stored_units(self, keys: Collection[str]) -> dict[str, UnitRecord]:
        return self._context.read(lambda session: units.get_many(session, self.score_set, keys))

    def _units_of(self, kind: str) -> tuple[UnitRecord, ...]:
        return self._context.read(lambda session: units.list_kind(session, self.score_set, kind))

    def _stored_keys(self) -> frozenset[ScoreKey]:
        return self._context.read(lambda session: scores.keys(session, self.score_set))

    def _run(self, wanted: Sequence[Unit], stage: Stage) -> None:
        span = Span(self._done[stage], self._expected.get(stage, 0))
        run_units(self._context, self._executor, self.score_set, wanted, stage, span=span)
        self._done[stage] += len(wanted)


def block_plan(choices: Choices, samples: int, spec: SessionSpec, inspection: Mapping[str, Any]) -> BlockPlan:
    """What blocks are planned by, with as many samples at a time as sessions of `spec` take."""
    schemes = tuple(dict.fromkeys(scheme for names in choices.values() for scheme in names))
    settings = replace(spec, batch_size=int(inspection["batch_size"]))
    return BlockPlan(tuple(choices), schemes, samples, settings)


def _of_unit(unit: str, metrics: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in metrics if SCORERS[without_context(name)].unit == unit)


def score_set_of(spec: SessionSpec, tenant: str = "default") -> tuple[str, dict[str, Any]]:
    """The digest of the score set that sessions of `spec` fill, and the settings it is the digest of."""
    settings = {"tenant": tenant, **spec.score_settings()}
    return digest(settings), settings


def notes_of(unit: UnitRecord) -> list[dict[str, str]]:
    """The notes that a session took while it measured the unit, each with its `layer` and `text`."""
    return list(unit.facts.get("notes", ()))


def inventory_of(inspection: Mapping[str, Any]) -> Inventory:
    """The layers that an inspection found."""
    return Inventory.from_json(dict(inspection["inventory"]))


Quality = tuple[Measured, dict[str, NDArray[np.float64]]]
"""The divergence of a plan and its quality by name, sample by sample."""


def among(quality: Quality, chosen: NDArray[np.bool_]) -> Quality:
    """The same of some samples alone."""
    measured, named = quality
    arrays = {"divergence": measured.per_sample, **named}
    return _measured({name: values[chosen] for name, values in arrays.items()})


def _changed(plan: Assignment) -> tuple[tuple[str, str], ...]:
    """What a plan changes: the same measurement whether full caches were a decision or not."""
    return tuple((name, scheme) for name, scheme in plan.items() if scheme != cache_scheme(FULL))


def _measured(arrays: Mapping[str, NDArray[Any]]) -> tuple[Measured, dict[str, NDArray[np.float64]]]:
    divergence = np.asarray(arrays["divergence"], dtype=np.float64)
    stderr = float(divergence.std(ddof=1) / np.sqrt(len(divergence))) if len(divergence) > 1 else float("nan")
    quality = {name: np.asarray(values) for name, values in arrays.items() if name != "divergence"}
    return Measured(float(divergence.mean()), stderr, divergence), quality
