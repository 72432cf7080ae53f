"""Magnitudes of layers' inputs over the scoring part, at full precision: what static activations go by."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from quant.activations import MULTIPLYING, TOKENWISE
from quant.codecs.activations import Magnitudes
from quant.layers import Inventory, Layer
from sensitivity.inputs import Batches, InputStatistics, input_rows, places_of, watch_all
from sensitivity.memory import CACHE_BYTES
from sensitivity.tasks.task import Batch


class InputMagnitudes:
    """Magnitudes by layer name, of all layers in one pass, which the first question starts.

    `batches` gives the micro-batches of the scoring part. Padding tokens are left out, as for second
    moments. Counts do not depend on the order of the data.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, batches: Batches) -> None:
        self._model, self._inventory, self._batches = model, inventory, batches
        self._found: dict[str, Magnitudes] = {}

    def __call__(self, name: str) -> Magnitudes:
        """Those of one layer; the model must hold its own weights. KeyError for no layer."""
        layer = self._inventory.by_name[name]
        if not self._found:
            layers = [other for other in self._inventory.layers if other.op in MULTIPLYING]
            self._found = count_magnitudes(self._model, layers, self._batches())
        return self._found[layer.name]


class SessionInputs(InputStatistics):
    """Second moments, when it is called, and `magnitudes` of the same inputs."""

    def __init__(
        self, model: nn.Module, inventory: Inventory, batches: Batches, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__(model, inventory, batches, cache_bytes)
        self.magnitudes = InputMagnitudes(model, inventory, batches)


def count_magnitudes(
    model: nn.Module, layers: Iterable[Layer], batches: Iterable[Batch]
) -> dict[str, Magnitudes]:
    """One pass over the batches; tied layers see the inputs of all their modules."""
    counts = [_Count(model, layer) for layer in layers]
    watch_all(model, counts, batches)
    return {count.layer.name: count.found for count in counts}


class _Count:
    """The magnitudes of one layer so far."""

    def __init__(self, model: nn.Module, layer: Layer) -> None:
        self.layer, self.places, self.found = layer, places_of(model, layer), Magnitudes.none()

    def add(self, module: nn.Module, values: Tensor, real: Tensor | None) -> None:
        if not values.is_floating_point():  # a table that shares the tensor looks rows up
            return
        pieces = input_rows(module, values, real) if self.layer.op in TOKENWISE else (values,)
        for piece in pieces:
            self.found = self.found.plus(piece)

    def add_experts(
        self, module: nn.Module, parameter: str, call: tuple[Tensor, Tensor], real: Tensor | None
    ) -> None:
        raise AssertionError("experts refuse activation formats")
