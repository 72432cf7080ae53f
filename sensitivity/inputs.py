"""Second moments of layers' inputs over the scoring part, at full precision: what GPTQ and its kin go by.

One forward pass over the part serves as many layers as fit in memory, in the model's order; what was dropped
is collected again. The numbers do not depend on which layers share a pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quant.inputs import LayerInputs
from quant.layers import Inventory, Layer
from sensitivity.magnitudes import InputMagnitudes
from sensitivity.tasks.task import Batch
from sensitivity.watching import Batches, groups_of, input_rows, watch

CACHE_BYTES = 2**30
"""Second moments beyond this are collected again when they are needed."""

UNSEEN = ("embedding", "experts", "experts_transposed")
"""Operations whose inputs are not collected: nothing is multiplied, or inside another module."""


class InputStatistics:
    """Statistics by layer name; `batches` gives the micro-batches of the scoring part, always the same.

    `magnitudes` are those of the same inputs, for static activations.
    """

    def __init__(
        self, model: nn.Module, inventory: Inventory, batches: Batches, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._model, self._inventory, self._batches, self._bound = model, inventory, batches, cache_bytes
        self._kept: OrderedDict[str, LayerInputs] = OrderedDict()
        self.magnitudes = InputMagnitudes(model, inventory, batches)

    def __call__(self, name: str) -> LayerInputs:
        """The statistics of one layer; the model must hold its own weights. KeyError for no layer."""
        layer = self._inventory.by_name[name]
        if layer.name not in self._kept:
            wanted = self._neighbors(layer)
            self._make_room(sum(self._bytes(other) for other in wanted))
            self._kept |= collect(self._model, wanted, self._batches())
        self._kept.move_to_end(layer.name)
        return self._kept[layer.name]

    def _neighbors(self, first: Layer) -> list[Layer]:
        """The layer and those after it that are not known, as many as half of the bound holds."""
        layers = self._inventory.layers
        chosen, size = [first], self._bytes(first)
        for layer in layers[layers.index(first) + 1 :]:
            if layer.name in self._kept or layer.op in UNSEEN:
                continue
            more = self._bytes(layer)
            if size + more > self._bound // 2:
                break
            chosen.append(layer)
            size += more
        return chosen

    def _bytes(self, layer: Layer) -> int:
        return 4 * groups_of(self._model.get_submodule(layer.name)) * layer.matrix[1] ** 2

    def _make_room(self, size: int) -> None:
        held = sum(inputs.second_moments.nbytes for inputs in self._kept.values())
        while self._kept and held + size > self._bound:
            held -= self._kept.popitem(last=False)[1].second_moments.nbytes


def collect(model: nn.Module, layers: Iterable[Layer], batches: Iterable[Batch]) -> dict[str, LayerInputs]:
    """One pass over the batches; tied layers see the inputs of all their modules."""
    sums = {layer.name: _Sum(model, layer) for layer in layers}
    watch(model, sums.values(), batches)
    return {name: found.inputs() for name, found in sums.items()}


class _Sum:
    """X'X of one layer, summed in float32 batch by batch, and the rows that went in."""

    def __init__(self, model: nn.Module, layer: Layer) -> None:
        self.layer, module = layer, model.get_submodule(layer.name)
        groups, columns = groups_of(module), layer.matrix[1]
        device = next(module.parameters()).device
        self.total = torch.zeros(groups, columns, columns, device=device)
        self.samples = 0

    def add(self, module: nn.Module, values: Tensor, real: Tensor | None) -> None:
        for rows in input_rows(module, values, real):
            self.total += rows.transpose(1, 2) @ rows
            self.samples += rows.shape[1]

    def inputs(self) -> LayerInputs:
        return LayerInputs(self.total / max(1, self.samples), self.samples)
