"""One loaded model with its data: runs units of work, the same numbers for the same unit everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.kv_cache import FULL, cache_scheme, is_cache, split
from quant.layers import Inventory
from sensitivity.block_watch import BlockWatch
from sensitivity.calibration import Samples, dtype_name, is_half, load_samples, placement
from sensitivity.catalog import SCORERS, TASKS, Metric, offered_metrics, unseen
from sensitivity.choice import Choice, OutputChoice
from sensitivity.contexts import LEAST_SAMPLES, context_of, members, without_context
from sensitivity.corrections import Corrections
from sensitivity.errors import (
    BadCalibration,
    BadUnit,
    BadUserMetric,
    MetricNotOffered,
    NonFiniteScore,
    SessionError,
)
from sensitivity.evidence import quality_interval
from sensitivity.forwards import Forwards
from sensitivity.gradient_runs import GradientRuns
from sensitivity.gradients import Contract, gradients
from sensitivity.inputs import Batches
from sensitivity.inventory import inventory_of
from sensitivity.kernels import KernelSession
from sensitivity.kv_cache import geometry_json
from sensitivity.magnitudes import SessionInputs
from sensitivity.memory import (
    CacheBounds,
    MemoryUse,
    anonymous_bytes,
    hand_back_freed_memory,
    mapped_bytes,
    watching,
)
from sensitivity.model_loading import available_device, load_model
from sensitivity.passes import GradientPass
from sensitivity.routers import coverage
from sensitivity.spec import PARTS, Json, SessionSpec
from sensitivity.spill import DiskBudget
from sensitivity.tasks.judged import judged
from sensitivity.tasks.task import Batch, PerSample, Task, first_tensor
from sensitivity.units import (
    Arrays,
    BlockUnit,
    InspectUnit,
    MakeUnit,
    MeasureUnit,
    ScoreRow,
    ScoreUnit,
    TimingUnit,
    Unit,
    UnitResult,
    WriteUnit,
    draws_name,
)
from sensitivity.user_code import imported
from sensitivity.weights import LayerWeights

QUANTIZING_BYTES, FACTOR_BYTES = 12, 40
"""Per weight of a layer that is being quantized: less than two float32 copies, and the result. Per pair of
its columns, where the quantizer goes by inputs: their moments, and factors of them in float64.
"""

MICRO_BATCH_BYTES = 2**28
"""Outputs of the samples that go through the model together; fewer go where theirs would be more."""


class Session:
    """Loads model and data of `spec` once; `run` then measures any unit.

    Raises SessionError (see sensitivity/errors.py) for everything that is wrong with model or data.
    Forward metrics run without gradients in fixed micro-batches: `spec.batch_size` samples, or as many as
    MICRO_BATCH_BYTES hold, which depends on model and data alone. Gradient metrics use the attention
    backend that can be differentiated twice. Model and weights are as before after every unit.
    """

    def __init__(self, spec: SessionSpec) -> None:
        torch.set_num_threads(spec.threads)
        if spec.memory_limit is not None:
            hand_back_freed_memory()
        loaded = load_model(spec.model, spec.task, available_device(spec.device))
        if spec.precision == "float32" and is_half(loaded.model):
            loaded.model.float()
        self.spec, self.model, self.task_name = spec, loaded.model, loaded.task
        self.task: Task = TASKS[loaded.task].load()
        if spec.user_metric is not None:
            self.task = judged(self.task, imported(spec.user_metric.location, "user metric", BadUserMetric))
        self.samples: Samples = load_samples(spec, loaded.task, loaded.model)
        self._spent, self._before = 0.0, 0.0
        self._notes: list[dict[str, Json]] = []
        self._width, self._batch_size = 0, spec.batch_size
        before = 0 if spec.memory_limit is None else anonymous_bytes()
        with watching(spec.memory_limit) as peak:
            self._check_samples()
            self.inventory: Inventory = self._take_inventory()
        self.memory = None if peak is None else self._memory_use(before, peak.bytes)
        self.bounds = CacheBounds() if self.memory is None else self.memory.bounds
        statistics = self._statistics_batches()
        self.inputs = SessionInputs(self.model, self.inventory, statistics, self.bounds.moments)
        self.disk = DiskBudget()
        in_files = None if self.memory is None else self.disk
        self.weights = LayerWeights(self.model, self.inventory, self.inputs, self.bounds.weights, in_files)
        self.corrections = Corrections(self.model, self.inventory, self.weights, statistics)
        self.forwards = Forwards(
            self.model,
            self.task,
            self.samples,
            self.weights,
            self._batch_size,
            reference_bytes=self.bounds.references,
            prefix_bytes=self.bounds.prefixes,
        )
        self.gradient_runs = GradientRuns(self, self.memory)
        if self.memory is not None:
            self.inputs.limited = True
            self.inputs.watch = BlockWatch(lambda: self.gradient_runs.chain, self.disk)
        self.task.check(self._everything(), self._width)

    def run(self, unit: Unit) -> UnitResult:
        """Measure one unit, in float32 if the model's own half precision overflows. Raises SessionError;
        NonFiniteScore names layer, scheme and metric.

        With a memory limit, `facts["anonymous_bytes"]` is the most that the unit held.
        """
        torch.set_num_threads(self.spec.threads)
        self._spent, self._before, self._notes = 0.0, self.forwards.spent, []
        with watching(self.spec.memory_limit) as peak:
            result = self._finite(unit)
        if peak is None or self.memory is None:
            return result
        self.memory.require_kept(peak.bytes, unit.key)
        return replace(result, facts={**result.facts, "anonymous_bytes": peak.bytes})

    def _finite(self, unit: Unit) -> UnitResult:
        try:
            return self._run(unit)
        except NonFiniteScore as error:
            if not is_half(self.model) or not self._float32_fits():
                raise
            return self._in_float32(unit, error)

    def _float32_fits(self) -> bool:
        """Whether a limit leaves room for the model in float32, which is no longer mapped."""
        exact = 4 * sum(parameter.numel() for parameter in self.model.parameters())
        return self.memory is None or anonymous_bytes() + exact < self.memory.available

    def _run(self, unit: Unit) -> UnitResult:
        match unit:
            case ScoreUnit():
                return self._score(unit)
            case BlockUnit():
                return self._block(unit)
            case MeasureUnit():
                return self._measure(unit)
            case InspectUnit():
                return self._inspect()
            case TimingUnit():
                return KernelSession(self.spec).run(unit)
            case WriteUnit() | MakeUnit():
                raise BadUnit(f"a session must be asked to measure. Got {unit.key!r}.")

    @cached_property
    def _precise(self) -> Session:
        return Session(replace(self.spec, precision="float32"))

    def _in_float32(self, unit: Unit, error: NonFiniteScore) -> UnitResult:
        """The unit measured by a session of the same model in float32, made when it is first needed."""
        result = self._precise.run(unit)
        self._notes = list(result.facts.get("notes", ()))
        where = f" of layer {error.layer!r}" if error.layer else ""
        stored = dtype_name(self.model)
        self.note(error.layer, f"{error.metric}{where} overflows in {stored}: measured in float32.")
        return replace(result, facts={**result.facts, **self._told()})

    # -- units ------------------------------------------------------------------------------------

    def _score(self, unit: ScoreUnit) -> UnitResult:
        if not is_cache(unit.scheme):
            self._make_room(unit.scheme)
        choice = self._choice(unit)
        rows: list[ScoreRow] = []
        arrays: Arrays = {}
        for name in unit.metrics:
            metric = self._metric(without_context(name), "choice")
            _require_seen(metric, unit.scheme)
            measured = metric.load().score(self._within(choice, metric, context_of(name)))
            _require_finite(name, unit, measured.value, measured.stderr, measured.arrays)
            rows.append(
                ScoreRow(unit.layer, unit.scheme, name, measured.value, measured.stderr, measured.samples)
            )
            arrays |= {_array_name(name, key, unit): array for key, array in measured.arrays.items()}
            if measured.per_sample is not None:
                arrays[draws_name(name)] = measured.per_sample
            if measured.note is not None:
                self.note(unit.layer, measured.note)
        return UnitResult(tuple(rows), arrays, {"forwards": self._forwards(), **self._told()})

    def _choice(self, unit: ScoreUnit) -> OutputChoice:
        """Raises BadUnit for an unknown layer or scheme."""
        pair = (unit.layer, unit.scheme)
        shared: dict[str, Any] = {"task": self.task, "seed": self.spec.seed, "forwards": self.forwards}
        shared["output_bytes"] = self.bounds.outputs
        if is_cache(unit.scheme):
            return OutputChoice(assignment=() if unit.scheme == cache_scheme(FULL) else (pair,), **shared)
        layer, scheme = self.weights.layer(unit.layer), self.weights.scheme(unit.scheme)
        assignment = ((layer.name, scheme.name),)
        return Choice(assignment=assignment, layer=layer, scheme=scheme, weights=self.weights, **shared)

    def _within(self, choice: OutputChoice, metric: Metric, context: str | None) -> OutputChoice:
        """The choice on the samples of a context. Raises MetricNotOffered, BadCalibration."""
        if context is None:
            return choice
        if not metric.by_context:
            raise MetricNotOffered(
                f"a metric by context must read outputs sample by sample. Got {metric.name}."
            )
        try:
            chosen = members(context, self._classes("scoring"), self._timesteps("scoring"))
        except ValueError as error:
            raise BadCalibration(str(error)) from error
        if chosen.sum() < LEAST_SAMPLES:
            raise BadCalibration(
                f"every context must hold at least {LEAST_SAMPLES} samples of the scoring part. "
                f"Got {int(chosen.sum())} in {context!r}. Send more data, or fewer contexts."
            )
        return choice.among(chosen)

    def _classes(self, part: str) -> list[str] | None:
        names = self.samples.contexts
        return None if names is None else [names[row] for row in self.samples.parts[part]]

    def _timesteps(self, part: str) -> list[float] | None:
        steps = self.samples.tensors.get("timestep")
        if steps is None or steps.ndim != 1:
            return None
        return [float(value) for value in steps[torch.as_tensor(self.samples.parts[part])].tolist()]

    def _block(self, unit: BlockUnit) -> UnitResult:
        metric = self._metric(unit.metric, "block")
        for scheme in unit.schemes:
            _require_seen(metric, scheme if is_cache(scheme) else self.weights.scheme(scheme).name)
        arrays = metric.load().measure(self, unit)
        return UnitResult((), arrays, {"forwards": self._forwards(), **self._told()})

    def _measure(self, unit: MeasureUnit) -> UnitResult:
        divergence, quality = [], []
        corrected = self.corrections.tensors(split(unit.assignment)[0], unit.corrections)
        for pair in self.forwards.pairs(unit.part, unit.assignment, corrected):
            divergence.append(self.task.divergence(pair.reference, pair.outputs))
            quality.append(self.task.quality(pair.outputs, pair.batch, pair.reference))
        arrays = {"divergence": np.concatenate(divergence)}
        arrays |= {name: np.concatenate([part[name] for part in quality]) for name in quality[0]}
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise NonFiniteScore(
                    f"{name} of a plan of {len(unit.assignment)} layers", "", "", _odd(values)
                )
        summary = {name: _summary(name, values) for name, values in arrays.items()}
        facts = {"divergence": summary.pop("divergence"), "quality": summary}
        return UnitResult((), arrays, facts | {"forwards": self._forwards()})

    def _inspect(self) -> UnitResult:
        has_labels = self.samples.labels is not None
        facts: dict[str, Json] = {
            "inventory": self.inventory.as_json(),
            "task": self.task_name,
            "samples": {part: len(self.samples.parts[part]) for part in PARTS},
            "divergence": TASKS[self.task_name].divergence,
            "geometry": geometry_json(self.model),
            "dtype": dtype_name(self.model),
            "has_labels": has_labels,
            "contexts": self._of_parts(self._classes),
            "timesteps": self._of_parts(self._timesteps),
            "available_metrics": list(self._offered()),
            "input_shapes": {name: list(tensor.shape[1:]) for name, tensor in self.samples.tensors.items()},
            "experts": coverage(self.model, self.forwards.batches("scoring")),
            "outputs": self._width,
            **self._memory_facts(),
            "batch_size": self._batch_size,
            "reuse": self.forwards.reuse(),
            "forward_seconds": self._seconds_per_sample(),
            "forwards": self._forwards() + 2 * self._first_batch().size,
        }
        return UnitResult((), {}, facts)

    def _memory_facts(self) -> dict[str, Json]:
        """What the limit is spent on, and whether gradients are streamed; {} without a limit."""
        if self.memory is None:
            return {}
        runs = self.gradient_runs
        answers = {"streamed": runs.streamed, "gradients_fit": runs.fit}
        return {"memory": {**self.memory.as_json(), "gradients": runs.use.as_json(), **answers}}

    def _memory_use(self, before: int, peak: int) -> MemoryUse:
        assert self.spec.memory_limit is not None
        weights = [(p.data_ptr(), p.nbytes) for p in self.model.parameters() if p.device.type == "cpu"]
        layers = self.inventory.layers
        return MemoryUse(
            limit=self.spec.memory_limit,
            loaded=before,
            mapped=mapped_bytes(weights),
            forward=peak - before,
            largest=QUANTIZING_BYTES * max(layer.parameters for layer in layers),
            factors=FACTOR_BYTES * max(layer.matrix[1] for layer in layers) ** 2,
        )

    def _make_room(self, scheme: str) -> None:
        """For one layer to be quantized and a forward pass. Raises MemoryLimitTooLow."""
        self.weights.bound(self.bounds.weights)
        if self.memory is None or not self.weights.scheme(scheme).needs_inputs:
            return
        needed = self.memory.forward + self.memory.quantizing(by_inputs=True)
        if anonymous_bytes() + needed > self.memory.available:
            self.forwards.forget()
            self.weights.bound(0)
        self.memory.require(self.memory.loaded + needed, f"a forward pass with one layer in {scheme}")

    def _of_parts(self, of: Callable[[str], Sequence[Json] | None]) -> Json:
        found = {part: of(part) for part in PARTS}
        return None if None in found.values() else found

    # -- what block scorers use -------------------------------------------------------------------

    def _forwards(self) -> float:
        """Work of the unit so far: passes of block scorers, and those of `forwards`."""
        return round(self._spent + self.forwards.spent - self._before, 6)

    def spend(self, forwards: float) -> None:
        """Add to the unit's work: forward passes of one sample."""
        self._spent += forwards

    def note(self, layer: str, text: str) -> None:
        """Say what a metric could not do for a layer and did instead; the job's summary tells the user."""
        self._notes.append({"layer": layer, "text": text})

    def _told(self) -> dict[str, Json]:
        return {"notes": self._notes} if self._notes else {}

    def batch_sizes(self, part: str) -> list[int]:
        """Samples in each micro-batch of a part."""
        count, size = len(self.samples.parts[part]), self._batch_size
        return [min(size, count - start) for start in range(0, count, size)]

    def sample(self, part: str, index: int) -> Batch:
        """One sample of a part."""
        return self._batch(self.samples.parts[part][index : index + 1])

    def take_gradients(self, asked: GradientPass) -> None:
        """Run a gradient pass over samples of the scoring part."""
        self.gradient_runs.run(asked)

    def differentiable_loss(self, part: str, position: int) -> tuple[Tensor, int]:
        """Mean loss over one micro-batch of a part and its samples, inside `gradients`."""
        self.gradient_runs.require_whole()
        start = position * self._batch_size
        batch = self._batch(self.samples.parts[part][start : start + self._batch_size])
        return self.task.loss(self.task.outputs(self.model, batch), batch), batch.size

    def differentiable_sample_loss(self, part: str, index: int) -> Tensor:
        """Loss of one sample of a part against the truth, inside `gradients`."""
        self.gradient_runs.require_whole()
        batch = self.sample(part, index)
        return self.task.loss(self.task.outputs(self.model, batch), batch)

    def backward(self, objective: Tensor, *, retain: bool = False) -> None:
        """Backward pass; nothing to do when no chosen layer has a part in the objective. `retain` keeps the
        graph for another one.
        """
        if objective.requires_grad:
            objective.backward(retain_graph=retain)  # type: ignore[no-untyped-call]

    def gradients(
        self, layers: tuple[str, ...], contract: Contract | None = None
    ) -> AbstractContextManager[None]:
        """See sensitivity/gradients.py; layers by name."""
        return gradients([self.weights.parameter(name) for name in layers], contract)

    # -- loading ----------------------------------------------------------------------------------

    def _metric(self, name: str, unit: str) -> Metric:
        metric = SCORERS.get(name)
        if metric is None or metric.unit != unit:
            known = ", ".join(n for n, m in SCORERS.items() if m.unit == unit)
            raise BadUnit(f"metric of a {unit} unit must be one of {known}. Got {name!r}.")
        offered = self._offered()
        if name not in offered:
            needs = ", ".join(sorted(metric.needs))
            raise MetricNotOffered(
                f"{name} needs {needs}, which {self.task_name} on these data does not give. "
                f"Offered are {', '.join(offered)}."
            )
        return metric

    def _offered(self) -> tuple[str, ...]:
        has_labels, has_experts = self.samples.labels is not None, bool(self.forwards.routers)
        return offered_metrics(
            self.task_name,
            has_labels=has_labels,
            has_experts=has_experts,
            has_user_metric=self.spec.user_metric is not None,
        )

    def _batch(self, rows: np.ndarray[Any, Any]) -> Batch:
        return self.samples.batch(rows, *placement(self.model))

    def _first_batch(self) -> Batch:
        return self._batch(self.samples.parts["scoring"][: self._batch_size])

    def _statistics_batches(self) -> Batches:
        """Gives the scoring part of the data that statistics of inputs come from."""
        spec, samples = self.spec.statistics or self.spec, self.samples
        if self.spec.statistics is not None:
            samples = load_samples(spec, self.task_name, self.model)
        return lambda: samples.batches("scoring", spec.batch_size, *placement(self.model))

    def _everything(self) -> Batch:
        samples = self.samples
        return Batch(samples.tensors, samples.labels, samples.positional, samples.count, samples.extras)

    def _check_samples(self) -> None:
        self.task.check(self._everything())
        try:
            with torch.inference_mode():
                self._batch_size = self._samples_at_a_time()
                rows = self.task.outputs(self.model, self._first_batch()).rows
            self._width = rows.shape[-1]
            if not bool(torch.isfinite(rows).all()):
                raise NonFiniteScore("output at full precision", "", "", "NaN or infinity")
        except SessionError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            shapes = {name: list(tensor.shape) for name, tensor in self.samples.tensors.items()}
            raise BadCalibration(
                f"the model must accept the calibration inputs {shapes}. Got {type(error).__name__}: "
                f"{error!s:.300}. Check the names and shapes of the inputs."
            ) from error

    def _samples_at_a_time(self) -> int:
        """As many samples as the bound holds of the outputs of one, in float32: as many whatever precision
        the model is in.
        """
        one = first_tensor(self._batch(self.samples.parts["scoring"][:1]).call(self.model))
        size = one.numel() * max(one.itemsize, torch.float32.itemsize)
        return max(1, min(self.spec.batch_size, MICRO_BATCH_BYTES // max(1, size)))

    def _take_inventory(self) -> Inventory:
        def run() -> int:
            batch = self._first_batch()
            with torch.inference_mode():
                batch.call(self.model)
            return batch.size

        return inventory_of(self.model, self.spec.include, self.spec.exclude, run)

    def _seconds_per_sample(self) -> float:
        batch = self._first_batch()
        self.forwards.outputs(batch)
        start = time.perf_counter()
        self.forwards.outputs(batch)
        return (time.perf_counter() - start) / batch.size


def _require_seen(metric: Metric, scheme: str) -> None:
    blind = unseen(metric.name, [scheme])
    if blind is not None:
        raise MetricNotOffered(blind)


def _array_name(metric: str, key: str, unit: ScoreUnit) -> str:
    clashes = len(unit.metrics) > 1 and key != "sketch"
    return f"{metric}.{key}" if clashes else key


def _require_finite(
    metric: str,
    unit: ScoreUnit,
    value: float,
    stderr: float | None,
    arrays: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    numbers: list[PerSample] = [np.array([value, stderr or 0.0]), *arrays.values()]
    for values in numbers:
        if not np.isfinite(values).all():
            raise NonFiniteScore(metric, unit.layer, unit.scheme, _odd(values))


def _odd(values: np.ndarray[Any, Any]) -> str:
    return str(values[~np.isfinite(values)][0])


def _summary(name: str, values: PerSample) -> dict[str, Json]:
    interval = quality_interval(name, values)
    return {"mean": interval.mean, "stderr": interval.stderr, "n": interval.n}
