"""Layers whose inputs are rounded before they are multiplied: the activation part of a scheme, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from quant.activations import ActivationFormat
from quant.codecs.activations import Magnitudes, best_range, round_input
from quant.inputs import InputsError, LayerInputs
from quant.layers import Layer
from quant.ops import OPS, op_of, to_matrix
from quant.quantizers.smoothquant import migration
from quant.schemes import Scheme

UNSEEN = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
"""The output projection of torch's attention, whose weight is used without calling the module."""


@runtime_checkable
class Ranges(Protocol):
    """Statistics that know how large inputs are."""

    @property
    def magnitudes(self) -> Callable[[str], Magnitudes]:
        """Layer name -> magnitudes of its inputs; asked only for schemes with a static activation."""


@dataclass(frozen=True)
class Rounding:
    """What the inputs of one layer become; `limit` is the range of a static format, else None.

    With `scales` (features,) the kernel sees input / scales, and its weight is multiplied by them.
    """

    layer: Layer
    fmt: ActivationFormat
    limit: float | None = None
    scales: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The layer's input as its kernel sees it, times the scales if there are any."""
        if self.scales is None:
            return round_input(values, self.fmt, self.layer.op, self.limit)
        scales = self.scales.to(values.device)
        rounded = round_input(values.float() / scales, self.fmt, self.layer.op, self.limit)
        return (rounded * scales).to(values.dtype)


def rounding_of(layer: Layer, scheme: Scheme, statistics: object, weight: Tensor) -> Rounding | None:
    """What a scheme rounds a layer's inputs to, None where it leaves them alone.

    `weight` is the layer's own, for schemes that divide inputs by scales that depend on it. Raises
    InputsError when the format refuses the layer, when statistics are missing (a static one needs `Ranges`,
    divided inputs need `LayerInputs`), and for magnitudes that are not finite.
    """
    if scheme.activation is None:
        return None
    refusal = scheme.activation.refuses(layer.op, layer.matrix[1])
    if refusal:
        raise InputsError(
            f"Scheme must be offered for its layer. Got {scheme.name} for {layer.name}: {refusal}."
        )
    if scheme.divides_inputs:
        return _divided(layer, scheme, scheme.activation, statistics, weight)
    if not scheme.needs_range:
        return Rounding(layer, scheme.activation)
    if not isinstance(statistics, Ranges):
        raise InputsError(
            f"Scheme {scheme.name} of layer {layer.name!r} must be given the magnitudes of its inputs."
            " Got none. Pass the calibration data that the plan was made with."
        )
    found = statistics.magnitudes(layer.name)
    if not found.finite:
        raise InputsError(
            f"Inputs of layer {layer.name!r} must be finite for scheme {scheme.name}. Got NaN or infinity."
            " Check the calibration data, or use a dynamic activation format."
        )
    return Rounding(layer, scheme.activation, best_range(found, scheme.activation))


def _divided(
    layer: Layer, scheme: Scheme, fmt: ActivationFormat, statistics: object, weight: Tensor
) -> Rounding:
    """Scales as the quantizer chooses them; a static range covers the largest of the divided inputs."""
    if not callable(statistics):
        raise InputsError(
            f"Scheme {scheme.name} of layer {layer.name!r} must be given statistics of the layer's inputs."
            " Got none. Pass the calibration data that the plan was made with."
        )
    known: LayerInputs = statistics(layer.name)
    with torch.inference_mode(False), torch.no_grad():
        matrix = to_matrix(weight.detach(), layer.op).to(known.second_moments.device)
        migrated = migration(matrix, known, scheme.parameter)
    assert known.largest is not None, "the migration goes by it"
    limit = (float((known.largest / migrated.scales.float()).amax()) or 1.0) if fmt.static else None
    return Rounding(layer, fmt, limit, migrated.scales.float())


@contextmanager
def rounded_inputs(model: nn.Module, roundings: Iterable[Rounding]) -> Iterator[nn.Module]:
    """The model with rounded inputs at every module that multiplies with a layer's weight, in the block.

    Raises InputsError for a module whose inputs cannot be reached.
    """
    with ExitStack() as stack:
        for rounding in roundings:
            for module in multiplying_modules(model, rounding.layer):
                hook = module.register_forward_pre_hook(_hook(rounding), with_kwargs=True)
                stack.callback(hook.remove)
        yield model


def multiplying_modules(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """The modules that multiply their input with the layer's weight, each once; embeddings look rows up."""
    modules = {id(module): module for module in (model.get_submodule(name) for name in layer.names)}
    found = [module for module in modules.values() if OPS[op_of(module) or layer.op].multiplies]
    for module in found:
        if isinstance(module, UNSEEN):
            raise InputsError(
                f"Inputs of layer {layer.name!r} must pass through its module to be rounded. Got the output"
                " projection of torch's attention, whose weight is used directly. Give it a scheme without"
                " activations, or exclude it."
            )
    return found


def _hook(rounding: Rounding) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (rounding(arguments[0]), *arguments[1:]), named
        first = next(iter(named))
        return arguments, {**named, first: rounding(named[first])}

    return hook
