"""Forward passes over a part, and the full-precision outputs that everything is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.corrections import replaced_tensors
from sensitivity.calibration import Samples, placement
from sensitivity.kv_cache import rounded_cache, split
from sensitivity.tasks.task import Batch, Outputs, Task
from sensitivity.weights import LayerWeights

REFERENCE_BYTES = 2**30
"""Full-precision outputs of a part beyond this are computed again, micro-batch by micro-batch."""

Assignment = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pair:
    """One micro-batch: its inputs, the full-precision outputs and those with quantized weights."""

    batch: Batch
    reference: Outputs
    outputs: Outputs


class Forwards:
    """Runs a model over parts of its samples in fixed micro-batches, without gradients."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        samples: Samples,
        weights: LayerWeights,
        batch_size: int,
        *,
        reference_bytes: int = REFERENCE_BYTES,
    ) -> None:
        self._model, self._task, self._samples, self._weights = model, task, samples, weights
        self._batch_size, self._bound = batch_size, reference_bytes
        self._references: dict[str, list[Outputs]] = {}
        self._rows: dict[str, int] = {}

    def batches(self, part: str) -> Iterator[Batch]:
        """The part's micro-batches on the model's device."""
        return self._samples.batches(part, self._batch_size, *placement(self._model))

    def outputs(
        self, batch: Batch, assignment: Assignment = (), corrected: Mapping[str, Tensor] | None = None
    ) -> Outputs:
        """The outputs of one micro-batch with the assigned layers and caches quantized and other tensors
        corrected.
        """
        weights, caches = split(assignment)
        changed = replaced_tensors(self._model, corrected or {})
        cached = rounded_cache(self._model, caches)
        with self._weights.swapped(weights), changed, cached, torch.inference_mode():
            return self._task.outputs(self._model, batch)

    def pairs(
        self, part: str, assignment: Assignment, corrected: Mapping[str, Tensor] | None = None
    ) -> Iterator[Pair]:
        """Each micro-batch beside its reference; the weights are swapped for one batch at a time."""
        for batch, reference in zip(self.batches(part), self.references(part), strict=True):
            outputs = self.outputs(batch, assignment, corrected) if assignment else reference
            yield Pair(batch, reference, outputs)

    def replaced_pairs(self, part: str, weights: Mapping[str, Tensor]) -> Iterator[Pair]:
        """As `pairs` for weights at hand, by layer."""
        for batch, reference in zip(self.batches(part), self.references(part), strict=True):
            with self._weights.replaced(weights), torch.inference_mode():
                outputs = self._task.outputs(self._model, batch)
            yield Pair(batch, reference, outputs)

    def rows(self, part: str) -> int:
        """Rows of outputs in the whole part."""
        if part not in self._rows:
            self._rows[part] = sum(len(outputs.rows) for outputs in self.references(part))
        return self._rows[part]

    def references(self, part: str) -> Iterable[Outputs]:
        """The full-precision outputs of the part: kept when they fit, else computed as they are read."""
        if part in self._references:
            return self._references[part]
        kept: list[Outputs] = []
        size = 0
        for batch in self.batches(part):
            kept.append(self.outputs(batch))
            size += 2 * kept[-1].rows.nbytes  # rows, and probabilities once they are asked for
            if size > self._bound:
                return (self.outputs(batch) for batch in self.batches(part))
        self._references[part] = kept
        return kept
