"""One loaded model with its data: runs units of work, the same numbers for the same unit everywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.geometry import geometry_of
from quant.inventory import AlreadyQuantized, NothingToQuantize, take_inventory
from quant.layers import Inventory
from quant.patterns import PatternError
from quant.schemes import Scheme
from sensitivity.calibration import Samples, load_samples, placement
from sensitivity.catalog import SCORERS, TASKS, Metric, offered_metrics, unseen_activations
from sensitivity.choice import Choice
from sensitivity.corrections import Corrections
from sensitivity.errors import (
    BadCalibration,
    BadPattern,
    BadUnit,
    MetricNotOffered,
    ModelAlreadyQuantized,
    ModelHasNothingToQuantize,
    NonFiniteScore,
    SessionError,
)
from sensitivity.evidence import quality_interval
from sensitivity.forwards import Forwards
from sensitivity.gradients import Contract, gradients
from sensitivity.inputs import Batches
from sensitivity.kernels import KernelSession
from sensitivity.kv_cache import split
from sensitivity.magnitudes import SessionInputs
from sensitivity.model_loading import load_model
from sensitivity.spec import PARTS, Json, SessionSpec
from sensitivity.tasks.task import Batch, Outputs, PerSample, Task
from sensitivity.units import (
    Arrays,
    BlockUnit,
    InspectUnit,
    MeasureUnit,
    ScoreRow,
    ScoreUnit,
    TimingUnit,
    Unit,
    UnitResult,
    WriteUnit,
)
from sensitivity.weights import LayerWeights


class Session:
    """Loads model and data of `spec` once; `run` then measures any unit.

    Raises SessionError (see sensitivity/errors.py) for everything that is wrong with model or data.
    Forward metrics run without gradients in fixed micro-batches; gradient metrics use the attention
    backend that can be differentiated twice. Model and weights are as before after every unit.
    """

    def __init__(self, spec: SessionSpec) -> None:
        torch.set_num_threads(spec.threads)
        loaded = load_model(spec.model, spec.task, _device(spec.device))
        self.spec, self.model, self.task_name = spec, loaded.model, loaded.task
        self.task: Task = TASKS[loaded.task].load()
        self.samples: Samples = load_samples(spec, loaded.task, loaded.model)
        self._spent = 0
        self._width = 0
        self._check_samples()
        self.inventory: Inventory = self._take_inventory()
        statistics = self._statistics_batches()
        self.inputs = SessionInputs(self.model, self.inventory, statistics)
        self.weights = LayerWeights(self.model, self.inventory, self.inputs)
        self.corrections = Corrections(self.model, self.inventory, self.weights, statistics)
        self.forwards = Forwards(self.model, self.task, self.samples, self.weights, spec.batch_size)
        self.task.check(self._everything(), self._width)

    def run(self, unit: Unit) -> UnitResult:
        """Measure one unit. Raises SessionError; NonFiniteScore names layer, scheme and metric."""
        torch.set_num_threads(self.spec.threads)
        self._spent = 0
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
            case WriteUnit():
                raise BadUnit("a session measures; checkpoints are written by a checkpoint writer.")

    # -- units ------------------------------------------------------------------------------------

    def _score(self, unit: ScoreUnit) -> UnitResult:
        choice = Choice(
            self.weights.layer(unit.layer),
            self.weights.scheme(unit.scheme),
            self.task,
            self.spec.seed,
            self.weights,
            self.forwards,
        )
        rows: list[ScoreRow] = []
        arrays: Arrays = {}
        for name in unit.metrics:
            metric = self._metric(name, "choice")
            _require_seen(metric, choice.scheme)
            measured = metric.load().score(choice)
            _require_finite(name, unit, measured.value, measured.stderr, measured.arrays)
            rows.append(
                ScoreRow(unit.layer, unit.scheme, name, measured.value, measured.stderr, measured.samples)
            )
            arrays |= {_array_name(name, key, unit): array for key, array in measured.arrays.items()}
        return UnitResult(tuple(rows), arrays, {"forwards": max((row.samples for row in rows), default=0)})

    def _block(self, unit: BlockUnit) -> UnitResult:
        metric = self._metric(unit.metric, "block")
        for scheme in unit.schemes:
            _require_seen(metric, self.weights.scheme(scheme))
        arrays = metric.load().measure(self, unit)
        return UnitResult((), arrays, {"forwards": self._spent})

    def _measure(self, unit: MeasureUnit) -> UnitResult:
        divergence, quality = [], []
        corrected = self.corrections.tensors(split(unit.assignment)[0], unit.corrections)
        for pair in self.forwards.pairs(unit.part, unit.assignment, corrected):
            divergence.append(self.task.divergence(pair.reference, pair.outputs))
            quality.append(self.task.quality(pair.outputs, pair.batch))
        arrays = {"divergence": np.concatenate(divergence)}
        arrays |= {name: np.concatenate([part[name] for part in quality]) for name in quality[0]}
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise NonFiniteScore(
                    f"{name} of a plan of {len(unit.assignment)} layers", "", "", _odd(values)
                )
        summary = {name: _summary(name, values) for name, values in arrays.items()}
        facts = {"divergence": summary.pop("divergence"), "quality": summary}
        return UnitResult((), arrays, facts | {"forwards": len(arrays["divergence"])})

    def _inspect(self) -> UnitResult:
        has_labels = self.samples.labels is not None
        facts: dict[str, Json] = {
            "inventory": self.inventory.as_json(),
            "task": self.task_name,
            "samples": {part: len(self.samples.parts[part]) for part in PARTS},
            "divergence": TASKS[self.task_name].divergence,
            "geometry": self._geometry(),
            "dtype": str(placement(self.model)[1]).removeprefix("torch."),
            "has_labels": has_labels,
            "available_metrics": list(offered_metrics(self.task_name, has_labels=has_labels)),
            "input_shapes": {name: list(tensor.shape[1:]) for name, tensor in self.samples.tensors.items()},
            "outputs": self._width,
            "forward_seconds": self._seconds_per_sample(),
            "forwards": 2 * self._first_batch().size,
        }
        return UnitResult((), {}, facts)

    def _geometry(self) -> Json:
        config: Any = getattr(self.model, "config", None)
        found = geometry_of(config.to_dict()) if hasattr(config, "to_dict") else None
        return None if found is None else found.as_json()

    # -- what block scorers use -------------------------------------------------------------------

    def spend(self, forwards: int) -> None:
        """Add to the unit's work: forward passes of one sample."""
        self._spent += forwards

    def batch_sizes(self, part: str) -> list[int]:
        """Samples in each micro-batch of a part."""
        count, size = len(self.samples.parts[part]), self.spec.batch_size
        return [min(size, count - start) for start in range(0, count, size)]

    def differentiable_outputs(self, part: str, index: int) -> Outputs:
        """Outputs of one sample of a part, inside `gradients`."""
        rows = self.samples.parts[part][index : index + 1]
        return self.task.outputs(self.model, self._batch(rows))

    def differentiable_loss(self, part: str, position: int) -> tuple[Tensor, int]:
        """Mean loss over one micro-batch of a part and its samples, inside `gradients`."""
        start = position * self.spec.batch_size
        batch = self._batch(self.samples.parts[part][start : start + self.spec.batch_size])
        return self.task.loss(self.task.outputs(self.model, batch), batch), batch.size

    def differentiable_sample_loss(self, part: str, index: int) -> Tensor:
        """Loss of one sample of a part against the truth, inside `gradients`."""
        batch = self._batch(self.samples.parts[part][index : index + 1])
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
        offered = offered_metrics(self.task_name, has_labels=self.samples.labels is not None)
        if name not in offered:
            needs = ", ".join(sorted(metric.needs))
            raise MetricNotOffered(
                f"{name} needs {needs}, which {self.task_name} on these data does not give. "
                f"Offered are {', '.join(offered)}."
            )
        return metric

    def _batch(self, rows: np.ndarray[Any, Any]) -> Batch:
        return self.samples.batch(rows, *placement(self.model))

    def _first_batch(self) -> Batch:
        return self._batch(self.samples.parts["scoring"][: self.spec.batch_size])

    def _statistics_batches(self) -> Batches:
        """Gives the scoring part of the data that statistics of inputs come from."""
        spec, samples = self.spec.statistics or self.spec, self.samples
        if self.spec.statistics is not None:
            samples = load_samples(spec, self.task_name, self.model)
        return lambda: samples.batches("scoring", spec.batch_size, *placement(self.model))

    def _everything(self) -> Batch:
        samples = self.samples
        return Batch(samples.tensors, samples.labels, samples.positional, samples.count)

    def _check_samples(self) -> None:
        self.task.check(self._everything())
        try:
            with torch.inference_mode():
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

    def _take_inventory(self) -> Inventory:
        def run() -> int:
            batch = self._first_batch()
            with torch.inference_mode():
                batch.call(self.model)
            return batch.size

        try:
            return take_inventory(self.model, include=self.spec.include, exclude=self.spec.exclude, run=run)
        except AlreadyQuantized as error:
            raise ModelAlreadyQuantized(str(error)) from error
        except NothingToQuantize as error:
            raise ModelHasNothingToQuantize(str(error)) from error
        except PatternError as error:
            raise BadPattern(str(error)) from error

    def _seconds_per_sample(self) -> float:
        batch = self._first_batch()
        self.forwards.outputs(batch)
        start = time.perf_counter()
        self.forwards.outputs(batch)
        return (time.perf_counter() - start) / batch.size


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SessionError(f"device must be available. Got {name!r}: {error!s:.200}. Use cpu.") from error
    return device


def _require_seen(metric: Metric, scheme: Scheme) -> None:
    if scheme.activation is not None and not metric.sees_activations:
        raise MetricNotOffered(unseen_activations(metric.name, scheme.name))


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
