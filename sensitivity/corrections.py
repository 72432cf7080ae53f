"""What a plan changes beside its weights, found on the data that statistics of inputs come from."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant.corrections import (
    Statistics,
    batch_norms,
    bias_of,
    corrected_bias,
    corrected_statistics,
    input_statistics,
    replaced_tensors,
)
from quant.layers import Inventory, Layer
from sensitivity.errors import BadCalibration
from sensitivity.inputs import Batches, input_rows, watch_all
from sensitivity.weights import LayerWeights

Assignment = Iterable[tuple[str, str]]


class Corrections:
    """The tensors of whole plans; what only depends on the full-precision model is found once."""

    def __init__(
        self, model: nn.Module, inventory: Inventory, weights: LayerWeights, batches: Batches
    ) -> None:
        self._model, self._inventory, self._weights, self._batches = model, inventory, weights, batches

    def tensors(self, assignment: Assignment, kinds: Iterable[str]) -> dict[str, Tensor]:
        """Name of parameter or buffer -> its corrected values, for a plan with these corrections.

        Biases first; batch norms then see the inputs that quantized weights and corrected biases give. The
        model is as before afterwards. Raises BadCalibration for batches that give no statistics.
        """
        chosen, found = tuple(assignment), dict[str, Tensor]()
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            if chosen and "bias" in kinds:
                found |= self._biases(chosen)
            if chosen and "batch_norm" in kinds and batch_norms(self._model):
                full = self._full_statistics
                with self._weights.swapped(chosen), replaced_tensors(self._model, found):
                    changed = self._statistics()
                found |= corrected_statistics(self._model, full, changed)
        return found

    def _biases(self, assignment: Assignment) -> dict[str, Tensor]:
        found = {}
        for name, scheme in assignment:
            layer = self._weights.layer(name)
            for path in layer.names:
                bias = bias_of(self._model, path, layer.op)
                if bias is not None and path in self._mean_inputs:
                    weight, quantized = self._weights.parameter(name), self._weights.quantized(name, scheme)
                    found[f"{path}.bias"] = corrected_bias(
                        bias, weight, quantized, layer.op, self._mean_inputs[path]
                    )
        return found

    @cached_property
    def _mean_inputs(self) -> dict[str, Tensor]:
        """Module path -> (groups, columns) mean of what it multiplies; only where the data come."""
        sums = {
            path: _Sum(layer, self._model.get_submodule(path))
            for layer in self._inventory.layers
            for path in layer.names
            if bias_of(self._model, path, layer.op) is not None
        }
        watch_all(self._model, sums.values(), self._batches())
        return {path: found.total / found.rows for path, found in sums.items() if found.rows}

    @cached_property
    def _full_statistics(self) -> Statistics:
        return self._statistics()

    def _statistics(self) -> Statistics:
        def run() -> None:
            for batch in self._batches():
                batch.call(self._model)

        try:
            return input_statistics(self._model, run)
        except ValueError as error:
            raise BadCalibration(
                f"the scoring part must give statistics of batch norms. Got {error!s:.200}."
                " Choose another batch size or number of samples, or leave out the correction batch_norm."
            ) from error


class _Sum:
    """Sum of one module's inputs, batch by batch; a Watcher."""

    def __init__(self, layer: Layer, module: nn.Module) -> None:
        self.layer, self.places = layer, [(module, "weight")]
        self.total, self.rows = torch.zeros(1, 1), 0

    def add(self, module: nn.Module, values: Tensor, real: Tensor | None) -> None:
        """One input of the module."""
        for rows in input_rows(module, values, real):
            self.total = self.total.to(rows.device) + rows.sum(dim=1)
            self.rows += rows.shape[1]

    def add_experts(
        self, module: nn.Module, parameter: str, call: tuple[Tensor, Tensor], real: Tensor | None
    ) -> None:
        """Experts have no bias that is corrected."""
