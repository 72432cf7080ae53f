"""Statistics of inputs by running only the blocks that hold the layers, on what one earlier run gave them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from sensitivity.blocks import Blocks, listening, resumed
from sensitivity.calibration import placement
from sensitivity.chain import Chain, NoChain, hidden_of
from sensitivity.inputs import Watcher, watch_all, watched
from sensitivity.spill import DiskBudget
from sensitivity.tasks.task import Batch

Span = tuple[int, int]
"""The first and the last of some blocks."""


class BlockWatch:
    """As `watch_all`, bit for bit, for the same batches each time.

    One run goes through all blocks and leaves what each gave in files; others begin at the first block that
    holds a watched layer, and end behind the last. Where the model is no chain, or a layer is
    outside of its blocks, the whole model runs.
    """

    def __init__(self, chain: Callable[[], Chain | NoChain], disk: DiskBudget) -> None:
        self._chain, self._disk = chain, disk
        self._values: dict[tuple[int, int], Tensor] = {}

    def __call__(self, model: nn.Module, watchers: Collection[Watcher], batches: Iterable[Batch]) -> None:
        """Run what the watchers need to see."""
        chain = self._chain()
        span = None if isinstance(chain, NoChain) else _span(chain, watchers)
        if span is None or isinstance(chain, NoChain):
            watch_all(model, watchers, batches)
            return
        for number, batch in enumerate(batches):
            with watched(watchers, batch):
                self._run(model, chain, span, number, batch)

    def _run(self, model: nn.Module, chain: Chain, span: Span, number: int, batch: Batch) -> None:
        first, last = span
        blocks = Blocks(chain.paths)
        known = (first, number) in self._values
        keep = first > 0 and not known and self._disk.has_room(batch.size * sum(chain.hidden))
        end = len(chain.paths) if keep else last + 1

        def take(boundary: int, output: Any) -> None:
            if keep and boundary < len(chain.paths):
                self._values[boundary, number] = self._disk.spilled(hidden_of(output))
            if boundary == end:
                raise _SeenAll

        with ExitStack() as stack:
            if known:
                value = chain.output(
                    first - 1, self._values[first, number].to(placement(model)[0], copy=True)
                )
                stack.enter_context(resumed(model, blocks, first, value))
            wanted = range(1, end + 1) if keep else (end,)
            stack.enter_context(listening(model, blocks, wanted, take))
            stack.enter_context(suppress(_SeenAll))
            batch.call(model)


class _SeenAll(Exception):  # noqa: N818 - leaves a run that has shown what it was made for
    pass


def _span(chain: Chain, watchers: Collection[Watcher]) -> Span | None:
    found = [chain.block_of(watcher.layer) for watcher in watchers]
    inside = [number for number in found if number is not None]
    return (min(inside), max(inside)) if inside and len(inside) == len(found) else None
