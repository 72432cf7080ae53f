"""Layers of a session as their schemes make them: rounded inputs, and quantized weights, made once, kept
within a bound, swapped in and out bit-exactly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.apply import ApplyError, InputsOf, NonFinite, quantized_weight
from quant.inputs import InputsError, LayerInputs
from quant.layers import Inventory, Layer
from quant.rounded_inputs import Rounding, multiplying_modules, rounded_inputs, rounding_of
from quant.schemes import Scheme, SchemeError, parse_scheme
from quant.shared import shared_parameters
from sensitivity.errors import BadUnit, NonFiniteWeights

CACHE_BYTES = 2**30
"""Quantized weights beyond this are made again when they are needed."""


class LayerWeights:
    """The weights of a model's layers, as they are and as a scheme would store them."""

    def __init__(
        self,
        model: nn.Module,
        inventory: Inventory,
        inputs: InputsOf | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._inventory, self._inputs, self._bound = inventory, inputs, cache_bytes
        self._roundings: dict[tuple[str, str], Rounding | None] = {}
        self._cache: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._held = 0
        self._owners = _owners(model)
        self._model = model

    def layer(self, name: str) -> Layer:
        """The layer of that name. Raises BadUnit."""
        layer = self._inventory.by_name.get(name)
        if layer is None:
            raise BadUnit(f"layer must be one that takes part. Got {name!r}. See the model's list of layers.")
        return layer

    def scheme(self, name: str) -> Scheme:
        """The scheme of that name. Raises BadUnit."""
        try:
            return parse_scheme(name)
        except SchemeError as error:
            raise BadUnit(str(error)) from error

    def parameter(self, name: str) -> nn.Parameter:
        """The layer's weight in the model."""
        return self._owners[self.layer(name).name][0]

    def modules(self, name: str) -> tuple[nn.Module, ...]:
        """Every module that multiplies with the layer's weight, each once."""
        found = {id(m): m for m in map(self._model.get_submodule, self.layer(name).names)}
        return tuple(found.values())

    def inputs(self, name: str) -> LayerInputs:
        """Second moments of the layer's inputs. Raises BadUnit in a session without data for them."""
        if self._inputs is None:
            raise BadUnit(f"statistics of the inputs of {name!r} must be at hand. Got none.")
        return self._inputs(self.layer(name).name)

    def quantized(self, name: str, scheme: str) -> Tensor:
        """The weight quantized and dequantized: same shape, type and device. Raises NonFiniteWeights."""
        alone = self.scheme(scheme).of_weights
        key = (name, alone.name)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        try:
            with torch.inference_mode(False), torch.no_grad():
                weight = quantized_weight(self.parameter(name), self.layer(name), alone, self._inputs)
        except NonFinite as error:
            raise NonFiniteWeights(str(error)) from error
        except ApplyError as error:
            raise BadUnit(str(error)) from error
        self._keep(key, weight)
        return weight

    def error(self, name: str, scheme: str) -> Tensor:
        """dW = quantized - stored, flat (P,), in at least float32."""
        precise = torch.promote_types(torch.float32, self.parameter(name).dtype)
        difference = self.quantized(name, scheme).to(precise) - self.parameter(name).detach().to(precise)
        return difference.reshape(-1)

    def rounding(self, name: str, scheme: str) -> Rounding | None:
        """What the layer's inputs are rounded to, None where the scheme leaves them. Raises BadUnit."""
        layer, chosen = self.layer(name), self.scheme(scheme)
        if chosen.activation is None:
            return None
        key = (layer.name, chosen.name if chosen.divides_inputs else chosen.activation.name)
        if key not in self._roundings:
            try:
                found = rounding_of(layer, chosen, self._inputs, self.parameter(name))
                if found is not None:
                    multiplying_modules(self._model, layer)
            except InputsError as error:
                raise BadUnit(str(error)) from error
            self._roundings[key] = found
        return self._roundings[key]

    @contextmanager
    def swapped(self, assignment: Iterable[tuple[str, str]]) -> Iterator[None]:
        """Layers compute as their schemes say inside; on exit the very same tensors are back."""
        pairs = list(assignment)
        weights = {name: self.quantized(name, scheme) for name, scheme in pairs}
        found = [self.rounding(name, scheme) for name, scheme in pairs]
        roundings = [rounding for rounding in found if rounding is not None]
        with self.replaced(weights), rounded_inputs(self._model, roundings):
            yield

    @contextmanager
    def replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Layers hold the given weights inside; on exit the very same tensors are back."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, weight in weights.items():
                for parameter in self._owners[self.layer(name).name]:
                    kept.append((parameter, parameter.data))
                    parameter.data = weight
            yield
        finally:
            for parameter, data in reversed(kept):
                parameter.data = data

    def _keep(self, key: tuple[str, str], weight: Tensor) -> None:
        size = weight.numel() * weight.element_size()
        while self._cache and self._held + size > self._bound:
            _, dropped = self._cache.popitem(last=False)
            self._held -= dropped.numel() * dropped.element_size()
        if size <= self._bound:
            self._cache[key] = weight
            self._held += size


def _owners(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """For each layer name: every distinct parameter that is that very memory."""
    owners: dict[str, list[nn.Parameter]] = {}
    for shared in shared_parameters(model):
        parameters = [use.module.get_parameter(use.attribute) for use in shared.uses]
        distinct = list({id(parameter): parameter for parameter in parameters}.values())
        owners |= {use.layer: distinct for use in shared.uses}
    return owners
