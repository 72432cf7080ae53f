"""Module types whose weight is a layer, and how each weight is seen as (output channels, columns).

A new module type is one line of OPS. Fused experts are parameters with names of their own (quant/experts.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import cast

from torch import Tensor, nn

from quant.experts import fused_projections, is_router
from quant.layers import EXPERT_OPS
from quant.storage import Matrix

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OpKind:
    """One line of OPS. `transposed` weights are stored as (columns, output channels)."""

    name: str
    applies: Callable[[nn.Module], bool]
    transposed: bool = False
    multiplies: bool = True


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Told by its name, so that transformers need not be loaded."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
        for kind in type(module).__mro__
    )


OPS: dict[str, OpKind] = {
    "linear": OpKind("linear", lambda module: isinstance(module, nn.Linear) or is_router(module)),
    "conv1d": OpKind("conv1d", lambda module: isinstance(module, nn.Conv1d)),
    "conv2d": OpKind("conv2d", lambda module: isinstance(module, nn.Conv2d)),
    "embedding": OpKind("embedding", lambda module: isinstance(module, nn.Embedding), multiplies=False),
    "transformers_conv1d": OpKind("transformers_conv1d", _is_transformers_conv1d, transposed=True),
    "experts": OpKind("experts", lambda module: "experts" in fused_projections(module).values()),
    "experts_transposed": OpKind(
        "experts_transposed",
        lambda module: "experts_transposed" in fused_projections(module).values(),
        transposed=True,
    ),
}


def op_of(module: nn.Module, parameter: str = "weight") -> str | None:
    """Key of OPS for a parameter of a module, or None."""
    found = next((name for name, kind in OPS.items() if kind.applies(module)), None)
    if found in EXPERT_OPS:
        return fused_projections(module).get(parameter)
    return found if parameter == "weight" else None


def matrix_shape(shape: Shape, op: str) -> Matrix:
    """(output channels, columns) of a weight of this shape; the channels of all experts one after another.

    >>> matrix_shape((8, 3, 5, 5), "conv2d"), matrix_shape((16, 48), "transformers_conv1d")
    ((8, 75), (48, 16))
    >>> matrix_shape((4, 6, 5), "experts"), matrix_shape((4, 5, 6), "experts_transposed")
    ((24, 5), (24, 5))
    """
    if op in EXPERT_OPS:
        experts, *sides = shape
        rows, columns = reversed(sides) if OPS[op].transposed else sides
        return experts * rows, columns
    columns = prod(shape[1:])
    return (columns, shape[0]) if OPS[op].transposed else (shape[0], columns)


def to_matrix(weight: Tensor, op: str) -> Tensor:
    """Weight -> (output channels, columns). Grouped convolutions need nothing special."""
    if op in EXPERT_OPS:
        return (weight.transpose(1, 2) if OPS[op].transposed else weight).flatten(0, 1)
    return weight.t() if OPS[op].transposed else weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, op: str, shape: Shape) -> Tensor:
    """(output channels, columns) -> weight: the inverse of `to_matrix`."""
    if op in EXPERT_OPS and OPS[op].transposed:
        return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
    return matrix.t() if OPS[op].transposed else matrix.reshape(shape)


def call_macs(module: nn.Module, op: str, inputs: Tensor, output: object) -> int:
    """Multiply-accumulates of one call: every output element sums over the columns of its channel.

    A router gives more than its products; those are told from its inputs.
    """
    if not OPS[op].multiplies:
        return 0
    rows, columns = matrix_shape(tuple(cast(Tensor, module.weight).shape), op)
    if isinstance(output, Tensor) and not is_router(module):
        return output.numel() * columns
    return inputs.numel() // columns * rows * columns
