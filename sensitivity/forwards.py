"""Forward passes over a part, and the full-precision outputs that everything is compared with.

A run begins at the first block that its changes reach (sensitivity/resuming.py); outputs are those of a whole
run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from quant.corrections import replaced_tensors
from quant.experts import router_paths
from quant.kv_cache import split
from sensitivity.calibration import Samples, placement
from sensitivity.kept import KeptParts
from sensitivity.kv_cache import rounded_cache
from sensitivity.resuming import PREFIX_BYTES, Change, Part, Resuming
from sensitivity.routers import Logits, router_logits
from sensitivity.spec import Json
from sensitivity.tasks.task import Batch, Outputs, Task
from sensitivity.weights import LayerWeights

REFERENCE_BYTES = 2**30
"""Full-precision outputs of a part, and its routers' logits, beyond this are computed again, micro-batch by
micro-batch.
"""

LENT = "scoring"
"""The part whose runs at full precision lend what blocks gave to later runs: layers change one at a time."""
SEARCHED = "choosing"
"""The part on which plans are tried that differ in few layers."""

Assignment = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pair:
    """One micro-batch: its inputs, the full-precision outputs and those with quantized weights."""

    batch: Batch
    reference: Outputs
    outputs: Outputs


class Forwards:
    """Runs a model over parts of its samples in fixed micro-batches, without gradients.

    `prefix_bytes` bound what blocks gave that is kept in host memory; 0 runs the whole model each time.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        samples: Samples,
        weights: LayerWeights,
        batch_size: int,
        *,
        reference_bytes: int = REFERENCE_BYTES,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self._model, self._task, self._samples, self._weights = model, task, samples, weights
        self._batch_size, self._prefix_bytes = batch_size, prefix_bytes
        self._references = KeptParts(self._full_precision, _output_bytes, reference_bytes)
        self._said = KeptParts(self._router_logits, _logit_bytes, reference_bytes)
        self._rows: dict[str, int] = {}

    @property
    def spent(self) -> float:
        """Forward passes of one sample that were run so far; a part of the blocks counts as its part of the
        work.
        """
        return self.resuming.spent if "resuming" in vars(self) else 0.0

    @cached_property
    def resuming(self) -> Resuming:
        """What finds the model's blocks, once, and runs from them."""
        sample = self._samples.batch(self._samples.parts[LENT][:1], *placement(self._model))
        return Resuming(self._model, self._task.outputs, sample, self._prefix_bytes)

    def batches(self, part: str) -> Iterator[Batch]:
        """The part's micro-batches on the model's device."""
        return self._samples.batches(part, self._batch_size, *placement(self._model))

    def outputs(
        self, batch: Batch, assignment: Assignment = (), corrected: Mapping[str, Tensor] | None = None
    ) -> Outputs:
        """The outputs of one micro-batch with the assigned layers and caches quantized and other tensors
        corrected, by a run of the whole model.
        """
        with self._changed(assignment, corrected or {}), torch.inference_mode():
            return self._task.outputs(self._model, batch)

    def pairs(
        self, part: str, assignment: Assignment, corrected: Mapping[str, Tensor] | None = None
    ) -> Iterator[Pair]:
        """Each micro-batch beside its reference; the weights are swapped for one batch at a time."""
        if not assignment:
            for batch, reference in zip(self.batches(part), self.references(part), strict=True):
                yield Pair(batch, reference, reference)
            return
        yield from self._pairs(part, self._change(assignment, corrected or {}), keep=part == SEARCHED)

    def replaced_pairs(self, part: str, weights: Mapping[str, Tensor]) -> Iterator[Pair]:
        """As `pairs` for weights at hand, by layer."""
        parts = tuple((name, self._place(name)) for name in weights)
        alone = next(iter(weights)) if len(weights) == 1 else None
        change = Change(parts, lambda: self._weights.replaced(weights), False, alone)
        yield from self._pairs(part, change, keep=False)

    def router_pairs(self, part: str, assignment: Assignment) -> Iterator[tuple[Logits, Logits, Batch]]:
        """What the routers of experts say at full precision and with the assignment, batch by batch."""
        change = self._change(assignment, {})
        both = zip(self.batches(part), self._said(part), strict=True)
        for number, (batch, reference) in enumerate(both):
            with router_logits(self._model, self.routers) as said:
                self._run(part, number, batch, change, keep=False)
            yield reference, said, batch

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """Paths of the model's routers; () for a model without experts."""
        return tuple(sorted(router_paths(self._model)))

    def rows(self, part: str) -> int:
        """Rows of outputs in the whole part."""
        if part not in self._rows:
            self._rows[part] = sum(len(outputs.rows) for outputs in self.references(part))
        return self._rows[part]

    def references(self, part: str) -> Iterable[Outputs]:
        """The full-precision outputs of the part: kept when they fit, else computed as they are read."""
        return self._references(part)

    def forget(self) -> None:
        """Drop what is kept: it is computed again when it is needed."""
        self._references.forget()
        self._said.forget()
        if "resuming" in vars(self):
            self.resuming.forget()

    def reuse(self) -> dict[str, Json]:
        """The blocks, why every run is whole if that is so, the share of a pass that each layer costs, and
        the bytes that are kept for it.
        """
        batch, unchanged = next(self.batches(LENT)), Change((), nullcontext)
        self._run(LENT, 0, batch, unchanged, keep=True)
        self._run(LENT, 0, batch, unchanged, keep=True)  # begins behind the last block, and is checked
        resuming = self.resuming
        shares = {layer.name: round(resuming.share(layer), 6) for layer in self._weights.layers}
        blocks, samples = resuming.blocks, len(self._samples.parts[LENT])
        return {
            "blocks": list(blocks.paths),
            "bytes": blocks.bytes,
            "kept_bytes": min(self._prefix_bytes, len(blocks.paths) * blocks.bytes * samples),
            "whole": resuming.fault,
            "shares": shares,
        }

    def _router_logits(self, part: str) -> Iterator[Logits]:
        """What the routers say at full precision."""
        for batch in self.batches(part):
            with router_logits(self._model, self.routers) as said:
                self.outputs(batch)
            yield said

    # -- runs -------------------------------------------------------------------------------------

    def _pairs(self, part: str, change: Change, *, keep: bool) -> Iterator[Pair]:
        both = zip(self.batches(part), self.references(part), strict=True)
        for number, (batch, reference) in enumerate(both):
            yield Pair(batch, reference, self._run(part, number, batch, change, keep=keep))

    def _full_precision(self, part: str) -> Iterator[Outputs]:
        unchanged = Change((), nullcontext)
        for number, batch in enumerate(self.batches(part)):
            yield self._run(part, number, batch, unchanged, keep=part == LENT)

    def _run(self, part: str, number: int, batch: Batch, change: Change, *, keep: bool) -> Outputs:
        samples = len(self._samples.parts[part]) if keep else 0
        return self.resuming.run(part, number, batch, change, samples)

    def _change(self, assignment: Assignment, corrected: Mapping[str, Tensor]) -> Change:
        """Rounded caches change every block that attends; corrected tensors stand at their modules."""
        weights, caches = split(assignment)
        parts: list[Part] = [((name, scheme), self._place(name)) for name, scheme in weights]
        parts += [((name,), self.resuming.blocks.place(name.rpartition(".")[0])) for name in corrected]
        parts += [(cache, 0) for cache in caches.items()]
        alone = weights[0][0] if len(parts) == len(weights) == 1 else None
        return Change(tuple(parts), lambda: self._changed(assignment, corrected), not caches, alone)

    def _place(self, name: str) -> int:
        return self.resuming.place(self._weights.layer(name))

    @contextmanager
    def _changed(self, assignment: Assignment, corrected: Mapping[str, Tensor]) -> Iterator[None]:
        weights, caches = split(assignment)
        with ExitStack() as stack:
            stack.enter_context(self._weights.swapped(weights))
            stack.enter_context(replaced_tensors(self._model, corrected))
            stack.enter_context(rounded_cache(self._model, caches))
            yield


def _output_bytes(outputs: Outputs) -> int:
    """Rows, and probabilities once they are asked for."""
    return 2 * outputs.rows.nbytes


def _logit_bytes(said: Logits) -> int:
    return sum(logits.nbytes for logits in said.values())
