"""Gradient at a layer's output times the change of that output.

Sum over the layer's outputs of (dL/dy * (y_q - y))^2, averaged over samples, L the sample's loss: what NVIDIA
ModelOpt's auto_quantize adds up in its gradient mode. One backward pass per sample, then one product with dW
per layer and scheme. Layers that are called several times, or share a tensor, add up. The calls of fused
experts are inside one module, and a router gives more than its products: their rows of the weight's gradient,
times those of dW, stand for them, which adds a row's tokens up before squaring.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sensitivity.scorers.sample_blocks import PerChoice, SampleBlocks, backward_finite
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quant.layers import Layer
    from sensitivity.gradients import Contract
    from sensitivity.session import Session


class GradientOutput(SampleBlocks):
    """Mean over samples of the sum of (dL/dy * (y_q - y))^2."""

    name = "gradient_output"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One forward and backward pass, then the layer alone for every scheme."""
        values = np.zeros((len(unit.layers), len(unit.schemes)))
        rows = _row_products(session, unit, values)
        with session.gradients(unit.layers, rows), _watched(session, unit.layers) as calls:
            loss = session.differentiable_sample_loss("scoring", index)
            backward_finite(session, loss, f"{self.name} on sample {index}")
            for call in calls:
                for column, scheme in enumerate(unit.schemes):
                    values[call.position, column] += call.squared_effect(session, unit, scheme)
        return values


def _row_products(session: Session, unit: BlockUnit, values: PerChoice) -> Contract:
    """Fills in the layers whose outputs are not seen: sum over rows of (g_row . dW_row)^2."""
    from quant.ops import to_matrix

    def contract(position: int, gradient: Tensor) -> None:
        layer = session.weights.layer(unit.layers[position])
        if not _seen(session, layer):
            for column, scheme in enumerate(unit.schemes):
                error = session.weights.error(layer.name, scheme).reshape(gradient.shape)
                products = to_matrix(error * gradient.to(error.dtype), layer.op).double().sum(dim=1)
                values[position, column] = float(products.square().sum())

    return contract


def _seen(session: Session, layer: Layer) -> bool:
    """Whether the layer's products are the outputs of a module."""
    from quant.experts import is_router
    from quant.layers import EXPERT_OPS

    return layer.op not in EXPERT_OPS and not any(map(is_router, session.weights.modules(layer.name)))


@dataclass
class Call:
    """One call of a layer's module: its input, and dL/dy once the backward pass knows it."""

    position: int
    module: nn.Module
    inputs: Tensor
    gradients: list[Tensor] = field(default_factory=list)

    def squared_effect(self, session: Session, unit: BlockUnit, scheme: str) -> float:
        """Sum of (dL/dy * dy)^2, dy the module's output for the weight dW and no bias."""
        import torch
        from torch.func import functional_call

        if not self.gradients:
            return 0.0
        layer = unit.layers[self.position]
        weight = session.weights.parameter(layer)
        error = session.weights.error(layer, scheme).reshape(weight.shape).to(weight.dtype)
        with torch.no_grad():
            bias = getattr(self.module, "bias", None)
            without = {} if bias is None else {"bias": torch.zeros_like(bias)}
            change = functional_call(self.module, {"weight": error, **without}, (self.inputs,))
            return float((change.float() * self.gradients[0].float()).double().square().sum())


@contextmanager
def _watched(session: Session, layers: tuple[str, ...]) -> Iterator[list[Call]]:
    calls: list[Call] = []
    hooks: list[Any] = []

    def hook_of(position: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            call = Call(position, module, arguments[0].detach())
            calls.append(call)
            if output.requires_grad:
                output.register_hook(lambda gradient: call.gradients.append(gradient.detach()))  # type: ignore[no-untyped-call]

        return hook

    try:
        for position, name in enumerate(layers):
            if _seen(session, session.weights.layer(name)):
                modules = session.weights.modules(name)
                hooks += [module.register_forward_hook(hook_of(position)) for module in modules]
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
