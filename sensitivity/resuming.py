"""Runs that begin at the first block that a change reaches, equal bit for bit to runs of the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.layers import EXPERT_OPS, Layer
from sensitivity.blocks import Blocks, find_blocks, listening, resumed
from sensitivity.calibration import placement
from sensitivity.prefixes import Prefixes
from sensitivity.tasks.task import Batch, Outputs

PREFIX_BYTES = 2**30
"""Outputs of blocks beyond this are computed again."""

Part = tuple[Hashable, int]
Applied = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Change:
    """What differs from full precision in a run: its parts with their places, and how to apply it.

    A place is the last boundary that the part cannot reach. Only runs of which all parts are `named`, so that
    equal names mean equal values, can lend what lies behind their first place. `layer` is set where one alone
    changes.
    """

    parts: tuple[Part, ...]
    applied: Applied
    named: bool = True
    layer: str | None = None

    @property
    def first(self) -> float:
        """The boundary before which nothing changes; infinite where nothing changes at all."""
        return min((place for _, place in self.parts), default=math.inf)

    def before(self, boundary: int) -> Hashable:
        """What is changed before a boundary; None where that has no name."""
        if boundary > self.first and not self.named:
            return None
        return tuple(part for part, place in self.parts if place < boundary)


class Resuming:
    """Runs batches of parts. `outputs` gives the model's outputs of a batch; `sample` is one of one sample.

    The first run that begins in the middle for a layer's change is made whole too: if any output differs,
    `fault` says so, and from then on every run is whole.
    """

    def __init__(
        self, model: nn.Module, outputs: Callable[[nn.Module, Batch], Outputs], sample: Batch, bound: int
    ) -> None:
        self._model, self._outputs, self._bound = model, outputs, bound
        self._prefixes = Prefixes(bound)
        self._checked: set[Hashable] = set()
        self.spent = 0.0
        self.blocks, self.fault = _found(model, sample)

    def place(self, layer: Layer) -> int:
        """The last boundary that no module of the layer can reach."""
        names = [name.rpartition(".")[0] if layer.op in EXPERT_OPS else name for name in layer.names]
        return min(map(self.blocks.place, names))

    def run(self, part: str, number: int, batch: Batch, change: Change, keep: int = 0) -> Outputs:
        """The outputs of micro-batch `number` of a part.

        Keeps what the block before the first change gave; with `keep`, the number of samples of the part,
        also what other blocks gave, as many of them as the bound holds for all samples.
        """
        groups = self._groups(part, change)
        known = [boundary for boundary, group in groups.items() if (group, number) in self._prefixes]
        start = max(known, default=0)
        wanted = [k for k in self._wanted(change, keep) if k > start and k in groups]

        def take(boundary: int, value: Any) -> None:
            self._prefixes.put(groups[boundary], number, value)

        if not start:
            return self._from(0, None, batch, change, wanted, take)
        value = self._prefixes.get(groups[start], number, placement(self._model)[0])
        if self._is_checked(start, change):
            return self._from(start, value, batch, change, wanted, take)
        return self._checked_against_whole(start, value, batch, change)

    def forget(self) -> None:
        """Drop what blocks gave."""
        self._prefixes.clear()

    def share(self, layer: Layer) -> float:
        """The share of a forward pass that a change of the layer costs."""
        return 1.0 if self.fault else self.blocks.shares[self.place(layer)]

    # -- parts ------------------------------------------------------------------------------------

    def _groups(self, part: str, change: Change) -> dict[int, Hashable]:
        """Boundary -> the group of what the blocks before it give, where equal groups mean equal values."""
        if self.fault:
            return {}
        found = {k: change.before(k) for k in range(1, len(self.blocks.paths) + 1)}
        return {k: (part, k, before) for k, before in found.items() if before is not None}

    def _wanted(self, change: Change, keep: int) -> list[int]:
        count = len(self.blocks.paths)
        first = min(change.first, count)
        if not keep:
            return [int(first)]
        stride = max(1, math.ceil(2 * count * keep * self.blocks.bytes / max(1, self._bound)))
        return [k for k in range(1, count + 1) if k % stride == 0 or k == first]

    def _from(
        self,
        start: int,
        value: Any,
        batch: Batch,
        change: Change,
        wanted: Collection[int],
        take: Callable[[int, Any], None],
    ) -> Outputs:
        self.spent += batch.size * self.blocks.shares[start]
        with ExitStack() as stack:
            stack.enter_context(change.applied())
            if start:
                stack.enter_context(resumed(self._model, self.blocks, start, value))
            stack.enter_context(listening(self._model, self.blocks, wanted, take))
            stack.enter_context(torch.inference_mode())
            return self._outputs(self._model, batch)

    def _is_checked(self, start: int, change: Change) -> bool:
        """A layer that changes alone has a check of its own; for all else one at the boundary will do."""
        return (start if change.layer is None else (start, change.layer)) in self._checked

    def _checked_against_whole(self, start: int, value: Any, batch: Batch, change: Change) -> Outputs:
        whole = self._from(0, None, batch, change, (), _drop)
        try:
            resumed_rows = self._from(start, value, batch, change, (), _drop).rows
            same = _equal(resumed_rows, whole.rows)
        except Exception as error:
            same, got = False, f"{type(error).__name__}: {error!s:.200}"
        else:
            got = "other outputs"
        if not same:
            self.fault = f"beginning at block {self.blocks.paths[start - 1]} gave {got}"
            self._prefixes.clear()
        self._checked |= {start, (start, change.layer)}
        return whole


def _found(model: nn.Module, sample: Batch) -> tuple[Blocks, str | None]:
    """The blocks, and why there are none."""
    try:
        blocks = find_blocks(model, lambda: sample.call(model))
    except Exception as error:
        return Blocks(), f"looking for the model's blocks failed with {type(error).__name__}: {error!s:.200}"
    return blocks, None if blocks.paths else "the model shows no blocks that run one after the other"


def _drop(boundary: int, value: Any) -> None:
    """Keeps nothing."""


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN like NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
