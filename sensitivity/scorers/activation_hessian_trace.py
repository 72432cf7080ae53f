"""HAWQ-V2's score on activations: average Hessian trace of a layer's output times that output's change.

Mean over samples of (Tr H_y / n) ||y_q - y||^2, y the layer's output of n elements on one sample and H_y the
Hessian of the sample's loss in it (Dong et al. 2020, arXiv:1911.03852, section 3.3), without a factor 1/2.
Outputs and not inputs: they change with the weights and with rounded inputs alike, so one number serves
every scheme. Tr H_y is z'H_y z with one Rademacher probe per sample, masked to the layer and shared by its
schemes. The output of fused experts and of routers is all that their module returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import rademacher
from sensitivity.scorers.sample_blocks import PerChoice, SampleBlocks
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sensitivity.session import Session

Places = Sequence[tuple["nn.Module", str]]
"""The modules that multiply with one layer's weight, and the weight's name in each."""

GRADIENT_FORWARDS = 3
PRODUCT_FORWARDS = 4
"""A forward and a backward pass, and a backward through the backward, in forward passes."""


class ActivationHessianTrace(SampleBlocks):
    """(Tr H_y / n) ||y_q - y||^2; layers that are called several times add their outputs up."""

    name = "activation_hessian_trace"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One sample after another."""
        return np.stack([self._sample_values(session, unit, index) for index in samples])

    def _sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass, one Hessian product per layer, and the layer alone for every scheme."""
        from sensitivity.inputs import places_of

        places = [places_of(session.model, session.weights.layer(name)) for name in unit.layers]
        modules = {id(module): module for own in places for module, _ in own}
        with session.gradients(()), _shifted(modules.values()) as calls:
            loss = session.differentiable_sample_loss("scoring", index)
            if not math.isfinite(float(loss.detach())):
                raise NonFiniteScore(f"{self.name} on sample {index}", "", "", str(float(loss.detach())))
            averages = _average_traces(session, unit, index, loss, [_shifts(own, calls) for own in places])
        session.spend(GRADIENT_FORWARDS + PRODUCT_FORWARDS * len(unit.layers))
        changes = [
            _squared_changes(session, unit, layer, own, calls)
            for layer, own in zip(unit.layers, places, strict=True)
        ]
        values: PerChoice = averages[:, None] * np.array(changes)
        return values


# -- outputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a module: what it was given, and the zeros that were added to each floating output."""

    module: nn.Module
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    shifts: tuple[Tensor, ...]


@contextmanager
def _shifted(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Adds zeros that need gradients to every output: derivatives in them are derivatives in the outputs."""
    calls: list[Call] = []
    hooks = [module.register_forward_hook(_shift_into(calls), with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _shift_into(calls: list[Call]) -> Any:
    import torch

    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        several = isinstance(output, tuple)
        parts = list(output) if several else [output]
        shifts = []
        for place, part in enumerate(parts):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                shifts.append(torch.zeros_like(part, requires_grad=True))
                parts[place] = part + shifts[-1]
        given = tuple(_detached(value) for value in arguments)
        calls.append(Call(module, given, {k: _detached(v) for k, v in named.items()}, tuple(shifts)))
        return tuple(parts) if several else parts[0]

    return hook


def _detached(value: Any) -> Any:
    import torch

    return value.detach() if isinstance(value, torch.Tensor) else value


def _shifts(places: Places, calls: Sequence[Call]) -> list[Tensor]:
    own = {id(module) for module, _ in places}
    return [shift for call in calls if id(call.module) in own for shift in call.shifts]


# -- curvature ------------------------------------------------------------------------------------


def _average_traces(
    session: Session, unit: BlockUnit, index: int, loss: Tensor, shifts: Sequence[Sequence[Tensor]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """z'Hz / n of each layer's block (layers,): one gradient for all, one product each."""
    import torch

    everything = list({id(shift): shift for own in shifts for shift in own}.values())
    found = torch.autograd.grad(loss, everything, create_graph=True, allow_unused=True) if everything else ()
    gradients = {id(shift): gradient for shift, gradient in zip(everything, found, strict=True)}
    averages = np.zeros(len(shifts))
    for position, own in enumerate(shifts):
        size = sum(shift.numel() for shift in own)
        if size:
            signs = rademacher(size, (session.spec.seed, unit.metric, unit.layers[position], index))
            averages[position] = _form(own, [gradients[id(shift)] for shift in own], signs) / size
    return averages


def _form(shifts: Sequence[Tensor], gradients: Sequence[Tensor | None], signs: Any) -> float:
    """z'Hz, z the `signs` over all elements of `shifts`; parts that the loss does not bend count 0."""
    import torch

    parts = np.split(signs, np.cumsum([shift.numel() for shift in shifts])[:-1])
    probes = [
        torch.from_numpy(part).view_as(shift).to(shift) for part, shift in zip(parts, shifts, strict=True)
    ]
    bent = [(g, z) for g, z in zip(gradients, probes, strict=True) if g is not None and g.requires_grad]
    if not bent:
        return 0.0
    products = torch.autograd.grad(
        [gradient for gradient, _ in bent],
        list(shifts),
        [probe for _, probe in bent],
        retain_graph=True,
        allow_unused=True,
    )
    return sum(
        float((product.double() * probe.double()).sum())
        for product, probe in zip(products, probes, strict=True)
        if product is not None
    )


# -- change ---------------------------------------------------------------------------------------


def _squared_changes(
    session: Session, unit: BlockUnit, layer: str, places: Places, calls: Sequence[Call]
) -> list[float]:
    """||y_q - y||^2 over all calls, by scheme. A table that is looked up has no inputs to round."""
    import torch

    parameters = {id(module): parameter for module, parameter in places}
    roundings = [session.weights.rounding(layer, scheme) for scheme in unit.schemes]
    rounded = _multiplying(session, layer) if any(roundings) else set()
    totals = [0.0] * len(unit.schemes)
    for call in (call for call in calls if id(call.module) in parameters):
        with torch.no_grad():
            before = _outputs(call)
            for column, (scheme, rounding) in enumerate(zip(unit.schemes, roundings, strict=True)):
                weight = {parameters[id(call.module)]: session.weights.quantized(layer, scheme)}
                after = _outputs(call, weight, rounding if id(call.module) in rounded else None)
                changes = [(a - b).double().square().sum() for a, b in zip(after, before, strict=True)]
                totals[column] += sum(map(float, changes))
    return totals


def _multiplying(session: Session, layer: str) -> set[int]:
    from quant.rounded_inputs import multiplying_modules

    return set(map(id, multiplying_modules(session.model, session.weights.layer(layer))))


def _outputs(call: Call, weights: Mapping[str, Tensor] = {}, rounding: Any = None) -> list[Tensor]:
    """The floating outputs of a call, in at least float32, with other weights and rounded inputs if given."""
    import torch
    from torch.func import functional_call

    held = {**dict(call.module.named_parameters()), **dict(call.module.named_buffers()), **weights}
    held = {name: _precise(tensor.detach()) for name, tensor in held.items()}
    given, named = list(map(_precise, call.arguments)), {k: _precise(v) for k, v in call.named.items()}
    if rounding is not None and given:
        given[0] = rounding(given[0])
    elif rounding is not None:
        first = next(iter(named))
        named[first] = rounding(named[first])
    output = functional_call(call.module, held, tuple(given), named)
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]


def _precise(value: Any) -> Any:
    import torch

    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
