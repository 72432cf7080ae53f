"""What a model is for: how its outputs are read, compared and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sensitivity.errors import BadCalibration, BadModel

PerSample = NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: named inputs (size, ...), labels or None, the input that goes by position or None.

    `extras` (size, ...) describe the samples to the task; the model never gets them.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    positional: str | None
    size: int
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def select(self, chosen: NDArray[np.bool_]) -> Batch:
        """The chosen samples alone; `chosen` has one entry per sample."""
        rows = torch.as_tensor(np.flatnonzero(chosen))

        def of(tensor: Tensor) -> Tensor:
            return tensor[rows.to(tensor.device)]

        inputs = {name: of(tensor) for name, tensor in self.inputs.items()}
        extras = {name: of(tensor) for name, tensor in self.extras.items()}
        labels = None if self.labels is None else of(self.labels)
        return Batch(inputs, labels, self.positional, int(chosen.sum()), extras)

    def call(self, model: nn.Module) -> Any:
        """The model's raw output."""
        if self.positional is not None:
            return model(self.inputs[self.positional])
        return model(**self.inputs)

    @property
    def tokens(self) -> Tensor:
        """The token ids (size, length): `input_ids`, or the one input there is."""
        if "input_ids" in self.inputs:
            return self.inputs["input_ids"]
        if len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        raise BadCalibration(f"token ids must be named input_ids. Got {', '.join(self.inputs)}.")


@dataclass(frozen=True)
class Outputs:
    """A model's outputs as rows (n, k) in at least float32; row i belongs to sample `sample[i]` of `size`."""

    rows: Tensor
    sample: NDArray[np.int64]
    size: int

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax of the rows (n, k), kept for the next comparison."""
        return self.rows.softmax(-1)

    @cached_property
    def rows_per_sample(self) -> PerSample:
        """How many rows each sample has (size,)."""
        return np.bincount(self.sample, minlength=self.size).astype(np.float64)

    def select(self, chosen: NDArray[np.bool_]) -> Outputs:
        """The rows of the chosen samples; `chosen` has one entry per sample."""
        rows = np.flatnonzero(chosen[self.sample])
        position = np.cumsum(chosen) - 1
        picked = self.rows[torch.as_tensor(rows).to(self.rows.device)]
        return Outputs(picked, position[self.sample[rows]], int(chosen.sum()))

    def sums(self, values: Tensor) -> PerSample:
        """Sums of `values` (n,) over each sample's rows (size,), in float64 and in a fixed order."""
        weights = values.detach().to("cpu", torch.float64).numpy()
        return np.bincount(self.sample, weights=weights, minlength=self.size).astype(np.float64)

    def means(self, values: Tensor) -> PerSample:
        """Means of `values` (n,) over each sample's rows (size,)."""
        return self.sums(values) / self.rows_per_sample


class Task(Protocol):
    """One kind of use. Divergence, sampled objective and change describe the same metric of the outputs."""

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the model; differentiable unless gradients are off."""

    def divergence(self, reference: Outputs, outputs: Outputs) -> PerSample:
        """How far `outputs` are from `reference`, per sample (size,), 0 where equal."""

    def change(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """d (n, k) such that half its squared norm, summed per sample, is the divergence to second order."""

    def sampled_objective(self, outputs: Outputs, generator: np.random.Generator) -> Tensor:
        """A scalar of one sample whose gradient g has E[(g . dW)^2] / 2 = divergence to second order."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean loss against the truth. Raises MetricNotOffered where the task has none."""

    def losses(self, outputs: Outputs, batch: Batch) -> PerSample:
        """The loss of each sample (size,); `loss` is their mean. Raises MetricNotOffered as `loss` does."""

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """The task's own measures per sample, by name, against the labels (empty where they are missing) or
        against the full-precision model's outputs, the `reference`.
        """

    def check(self, batch: Batch, width: int | None = None) -> None:
        """Raises BadCalibration, naming the row, for samples that this task cannot use.

        Called with all samples, before the first forward and again with the width k of the outputs.
        """


def one_row_per_sample(rows: Tensor, size: int) -> Outputs:
    """Outputs of shape (size, k). Raises BadModel for another number of rows."""
    if rows.ndim != 2 or rows.shape[0] != size:
        raise BadModel(f"the model must return one row per sample. Got shape {tuple(rows.shape)} for {size}.")
    return Outputs(at_least_float32(rows), np.arange(size), size)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def first_tensor(output: Any, names: tuple[str, ...] = ("logits", "last_hidden_state")) -> Tensor:
    """The tensor that stands for a model's output: itself, a named field, or the first floating one.

    Raises BadModel when there is none.
    """
    if isinstance(output, Tensor):
        return output
    fields = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in names}
    found: list[Tensor] = [value for name in names if isinstance(value := fields.get(name), Tensor)]
    others = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    found += [value for value in others if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise BadModel(f"the model must return a tensor of floats. Got {type(output).__name__}.")
    return found[0]
