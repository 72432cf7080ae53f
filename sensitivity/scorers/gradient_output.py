"""Gradient at a layer's output times the change of that output.

Sum over the layer's outputs of (dL/dy * (y_q - y))^2, averaged over samples, L the sample's loss: what NVIDIA
ModelOpt's auto_quantize adds up in its gradient mode. One backward pass per sample, then one product with dW
per layer and scheme. Layers that are called several times, or share a tensor, add up. The calls of fused
experts are inside one module, and a router gives more than its products: their rows of the weight's gradient,
times those of dW, stand for them, which adds a row's tokens up before squaring.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from sensitivity.scorers.sample_blocks import PerChoice, SampleBlocks, truth
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quant.layers import Layer
    from sensitivity.session import Session


class GradientOutput(SampleBlocks):
    """Mean over samples of the sum of (dL/dy * (y_q - y))^2."""

    name = "gradient_output"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One forward and backward pass per sample, then the layer alone for every scheme."""
        from sensitivity.passes import GradientPass, Place

        found = np.zeros((len(samples), len(unit.layers), len(unit.schemes)))

        def take(place: Place, gradient: Tensor) -> None:
            if not _seen(session, session.weights.layer(unit.layers[place.position])):
                for column in place.columns:
                    found[place.row, place.position, column] = _row_products(
                        session, unit.layers[place.position], unit.schemes[column], gradient
                    )

        @contextmanager
        def around(row: int, positions: Collection[int], columns: range) -> Iterator[None]:
            with _watched(session, unit, positions, columns, found[row]):
                yield

        for name in unit.layers:
            if not _seen(session, session.weights.layer(name)):
                session.note(name, f"{self.name} of layer {name!r} takes rows of the gradient for outputs.")
        session.take_gradients(
            GradientPass(unit.metric, unit.layers, unit.schemes, samples, truth(session), take, around=around)
        )
        return found


def _row_products(session: Session, name: str, scheme: str, gradient: Tensor) -> float:
    """Sum over rows of (g_row . dW_row)^2, for layers whose outputs are not seen."""
    from quant.ops import to_matrix

    error = session.weights.error(name, scheme).reshape(gradient.shape)
    matrix = to_matrix(error * gradient.to(error.dtype), session.weights.layer(name).op)
    return float(matrix.double().sum(dim=1).square().sum())


def _seen(session: Session, layer: Layer) -> bool:
    """Whether the layer's products are the outputs of a module."""
    from quant.experts import is_router
    from quant.layers import EXPERT_OPS

    return layer.op not in EXPERT_OPS and not any(map(is_router, session.weights.modules(layer.name)))


def _squared_effect(
    session: Session, layer: str, scheme: str, module: nn.Module, inputs: Tensor, gradient: Tensor
) -> float:
    """Sum of (dL/dy * dy)^2, dy the module's output for the weight dW and no bias."""
    import torch
    from torch.func import functional_call

    weight = session.weights.parameter(layer)
    error = session.weights.error(layer, scheme).reshape(weight.shape).to(weight.dtype)
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        without = {} if bias is None else {"bias": torch.zeros_like(bias)}
        change = functional_call(module, {"weight": error, **without}, (inputs,))
        return float((change.float() * gradient.float()).double().square().sum())


@contextmanager
def _watched(
    session: Session, unit: BlockUnit, positions: Collection[int], columns: range, values: PerChoice
) -> Iterator[None]:
    """Adds what each call of a layer's module gives to `values` (layers, schemes) once dL/dy is known."""
    hooks: list[Any] = []

    def hook_of(position: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            inputs = arguments[0].detach()

            def add(gradient: Tensor) -> None:
                for column in columns:
                    values[position, column] += _squared_effect(
                        session, unit.layers[position], unit.schemes[column], module, inputs, gradient
                    )

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    try:
        for position in positions:
            name = unit.layers[position]
            if _seen(session, session.weights.layer(name)):
                hooks += [m.register_forward_hook(hook_of(position)) for m in session.weights.modules(name)]
        yield
    finally:
        for hook in hooks:
            hook.remove()
