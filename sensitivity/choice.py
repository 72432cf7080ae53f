"""One (layer, scheme) under measurement, and what a scorer returns for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quant.layers import Layer
from quant.schemes import Scheme
from sensitivity.estimators import mean_estimate
from sensitivity.forwards import Assignment, Forwards, Pair
from sensitivity.memory import CACHE_BYTES
from sensitivity.tasks.task import PerSample, Task
from sensitivity.weights import LayerWeights


@dataclass(frozen=True)
class Measured:
    """Value, standard error over samples (None without data), number of samples, arrays to keep, each
    sample's value (n,), whose mean is the value, and what the metric did instead of what it is for.
    """

    value: float
    stderr: float | None
    samples: int
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    per_sample: PerSample | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class OutputChoice:
    """A layer's weight or an attention layer's cache in a scheme, for metrics that look at outputs alone.

    Everything is computed when it is first asked for, and once for all metrics; outputs beyond `output_bytes`
    are computed again for each metric that reads them.
    """

    assignment: Assignment
    task: Task
    seed: int
    forwards: Forwards
    output_bytes: int = CACHE_BYTES
    whole: OutputChoice | None = None
    chosen: NDArray[np.bool_] | None = None

    def among(self, chosen: NDArray[np.bool_]) -> OutputChoice:
        """The same choice on some samples of the scoring part (one entry each); the passes are shared."""
        return replace(self, whole=self, chosen=chosen)

    def pairs(self) -> Iterator[Pair]:
        """Micro-batches of the scoring part: reference outputs and outputs with this choice."""
        if self.whole is not None and self.chosen is not None:
            yield from _selected(self.whole.pairs(), self.chosen)
        elif self._kept is not None:
            yield from self._kept
        else:
            yield from self._run()

    def _run(self) -> Iterator[Pair]:
        return self.forwards.pairs("scoring", self.assignment)

    @cached_property
    def _kept(self) -> list[Pair] | None:
        kept: list[Pair] = []
        size = 0
        for pair in self._run():
            kept.append(pair)
            size += pair.outputs.rows.nbytes
            if size > self.output_bytes:
                return None
        return kept

    @cached_property
    def divergence(self) -> PerSample:
        """The task's divergence of each sample of the scoring part."""
        return np.concatenate([self.task.divergence(pair.reference, pair.outputs) for pair in self.pairs()])


@dataclass(frozen=True, kw_only=True)
class Choice(OutputChoice):
    """A layer with a scheme, and its weight."""

    layer: Layer
    scheme: Scheme
    weights: LayerWeights

    @property
    def weight(self) -> Tensor:
        """The stored weight, in the module's shape."""
        return self.weights.parameter(self.layer.name).detach()

    @property
    def quantized(self) -> Tensor:
        """The weight quantized and dequantized, same shape and type."""
        return self.weights.quantized(self.layer.name, self.scheme.name)

    @property
    def weight_error(self) -> Tensor:
        """dW, flat (P,), in at least float32."""
        return self.weights.error(self.layer.name, self.scheme.name)


def _selected(pairs: Iterator[Pair], chosen: NDArray[np.bool_]) -> Iterator[Pair]:
    start = 0
    for pair in pairs:
        part = chosen[start : start + pair.batch.size]
        start += pair.batch.size
        if part.any():
            yield Pair(pair.batch.select(part), pair.reference.select(part), pair.outputs.select(part))


def measured_mean(per_sample: PerSample, arrays: Mapping[str, NDArray[Any]] | None = None) -> Measured:
    """The mean over samples with its standard error."""
    estimate = mean_estimate(per_sample)
    return Measured(estimate.value, estimate.stderr, estimate.n, arrays or {}, per_sample)
