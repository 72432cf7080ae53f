"""Layers of a session as their schemes make them: rounded inputs, and quantized weights, made once, kept
within a bound, swapped in and out bit-exactly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.apply import ApplyError, InputsOf, NonFinite, quantized_weight
from quant.inputs import InputsError, LayerInputs
from quant.layers import Inventory, Layer
from quant.rounded_inputs import Rounding, multiplying_modules, rounded_inputs, rounding_of
from quant.schemes import Scheme, SchemeError, parse_scheme
from quant.shared import shared_parameters
from sensitivity.errors import BadUnit, DiskFull, NonFiniteWeights
from sensitivity.memory import CACHE_BYTES
from sensitivity.spill import MOST_FILES, DiskBudget

STACKED = 4
"""Errors are multiplied so many at a time, so that none depends on how many there are."""


class LayerWeights:
    """The weights of a model's layers, as they are and as a scheme would store them.

    Quantized weights beyond `cache_bytes` are made again when they are needed. With a `disk` they are kept in
    mapped files instead, as many as it has room for, and in memory where it has none.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: Inventory,
        inputs: InputsOf | None = None,
        cache_bytes: int = CACHE_BYTES,
        disk: DiskBudget | None = None,
    ) -> None:
        self._disk = disk
        self._files: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        if disk is not None:
            disk.lend(self._file_bytes, self._drop_file)
        self._inventory, self._inputs, self._bound = inventory, inputs, cache_bytes
        self._roundings: dict[tuple[str, str], Rounding | None] = {}
        self._cache: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._held = 0
        self._errors: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        self._owners = _owners(model)
        self._model = model

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that takes part, in the model's order."""
        return self._inventory.layers

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
        for kept in (self._cache, self._files):
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
        try:
            with torch.inference_mode(False), torch.no_grad():
                weight = quantized_weight(self.parameter(name), self.layer(name), alone, self._inputs)
        except NonFinite as error:
            raise NonFiniteWeights(str(error)) from error
        except ApplyError as error:
            raise BadUnit(str(error)) from error
        return self._keep(key, weight)

    def error(self, name: str, scheme: str) -> Tensor:
        """dW = quantized - stored, flat (P,), in at least float32."""
        (whole,) = self.error_pieces(name, scheme, self.parameter(name).numel())
        return whole

    def errors(self, name: str, schemes: Sequence[str]) -> Tensor | None:
        """dW of several schemes, (schemes and zeros up to a multiple of 4, P), made once and kept; None where
        the errors of all layers together leave no room, or memory is limited.
        """
        if self._disk is not None:
            return None
        asked = tuple(schemes)
        if name in self._errors and self._errors[name][0] == asked:
            return self._errors[name][1]
        self._errors.pop(name, None)
        weight = self.parameter(name)
        rows = -(-len(asked) // STACKED) * STACKED
        precise = torch.promote_types(torch.float32, weight.dtype)
        size = rows * weight.numel() * precise.itemsize
        held = sum(stack.nbytes for _, stack in self._errors.values())
        if held + size > self._bound // 2:
            return None
        stack = torch.zeros(rows, weight.numel(), dtype=precise, device=weight.device)
        for row, scheme in enumerate(asked):
            stack[row] = self.error(name, scheme)
        self._errors[name] = (asked, stack)
        return stack

    def error_pieces(self, name: str, scheme: str, size: int) -> Iterator[Tensor]:
        """dW as `error` gives it, `size` weights at a time."""
        weight = self.parameter(name).detach()
        precise = torch.promote_types(torch.float32, weight.dtype)
        quantized, flat = self.quantized(name, scheme).reshape(-1), weight.reshape(-1)
        for start in range(0, len(flat), size):
            yield quantized[start : start + size].to(precise) - flat[start : start + size].to(precise)

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

    def bound(self, cache_bytes: int) -> None:
        """Keep no more than this from now on."""
        self._bound = cache_bytes
        self._errors.clear()
        self._make_room(0)

    def _make_room(self, size: int) -> None:
        while self._cache and self._held + size > self._bound:
            self._held -= self._cache.popitem(last=False)[1].nbytes

    def _keep(self, key: tuple[str, str], weight: Tensor) -> Tensor:
        """Keep a weight as there is room; where it is then."""
        kept = self._in_file(weight)
        if kept is not None:
            self._files[key] = kept
            return kept
        size = weight.nbytes
        self._make_room(size)
        if size <= self._bound:
            self._cache[key] = weight
            self._held += size
        return weight

    def _in_file(self, weight: Tensor) -> Tensor | None:
        """A copy in a file, if need be in place of those that were used longest ago; None without room."""
        if self._disk is None or weight.device.type != "cpu":
            return None
        while len(self._files) >= MOST_FILES or not self._disk.has_room(weight.nbytes):
            if not self._drop_file():
                return None
        try:
            return self._disk.spilled(weight)
        except DiskFull:
            return None

    def _file_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._files.values())

    def _drop_file(self) -> bool:
        """Drop the weight in a file that was used longest ago, if there is one."""
        if self._files:
            self._files.popitem(last=False)
            return True
        return False


def _owners(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """For each layer name: every distinct parameter that is that very memory."""
    owners: dict[str, list[nn.Parameter]] = {}
    for shared in shared_parameters(model):
        parameters = [use.module.get_parameter(use.attribute) for use in shared.uses]
        distinct = list({id(parameter): parameter for parameter in parameters}.values())
        owners |= {use.layer: distinct for use in shared.uses}
    return owners
