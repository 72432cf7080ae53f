"""One (layer, scheme) under measurement, and what a scorer returns for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quant.layers import Layer
from quant.schemes import Scheme
from sensitivity.estimators import mean_estimate
from sensitivity.forwards import Forwards, Pair
from sensitivity.tasks.task import PerSample, Task
from sensitivity.weights import LayerWeights

OUTPUT_BYTES = 2**30
"""Outputs of one choice beyond this are computed again for each metric that reads them."""


@dataclass(frozen=True)
class Measured:
    """Value, standard error over samples (None without data), number of samples, and arrays to keep."""

    value: float
    stderr: float | None
    samples: int
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A layer with a scheme. Everything is computed when it is first asked for, and once for all metrics."""

    layer: Layer
    scheme: Scheme
    task: Task
    seed: int
    weights: LayerWeights
    forwards: Forwards
    output_bytes: int = OUTPUT_BYTES

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

    def pairs(self) -> Iterator[Pair]:
        """Micro-batches of the scoring part: reference outputs and outputs with this layer quantized."""
        if self._kept is not None:
            yield from self._kept
        else:
            yield from self._run()

    def _run(self) -> Iterator[Pair]:
        return self.forwards.pairs("scoring", ((self.layer.name, self.scheme.name),))

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


def measured_mean(per_sample: PerSample, arrays: Mapping[str, NDArray[Any]] | None = None) -> Measured:
    """The mean over samples with its standard error."""
    estimate = mean_estimate(per_sample)
    return Measured(estimate.value, estimate.stderr, estimate.n, arrays or {})
