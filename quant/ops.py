"""Module types whose weight is a layer, and how each weight is seen as (output channels, columns).

A new module type is one line of OPS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

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
    "linear": OpKind("linear", lambda module: isinstance(module, nn.Linear)),
    "conv1d": OpKind("conv1d", lambda module: isinstance(module, nn.Conv1d)),
    "conv2d": OpKind("conv2d", lambda module: isinstance(module, nn.Conv2d)),
    "embedding": OpKind("embedding", lambda module: isinstance(module, nn.Embedding), multiplies=False),
    "transformers_conv1d": OpKind("transformers_conv1d", _is_transformers_conv1d, transposed=True),
}


def op_of(module: nn.Module) -> str | None:
    """Key of OPS for a module, or None."""
    return next((name for name, kind in OPS.items() if kind.applies(module)), None)


def matrix_shape(shape: Shape, op: str) -> Matrix:
    """(output channels, columns) of a weight of this shape.

    >>> matrix_shape((8, 3, 5, 5), "conv2d"), matrix_shape((16, 48), "transformers_conv1d")
    ((8, 75), (48, 16))
    """
    columns = 1
    for side in shape[1:]:
        columns *= side
    return (columns, shape[0]) if OPS[op].transposed else (shape[0], columns)


def to_matrix(weight: Tensor, op: str) -> Tensor:
    """Weight -> (output channels, columns). Grouped convolutions need nothing special."""
    return weight.t() if OPS[op].transposed else weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, op: str, shape: Shape) -> Tensor:
    """(output channels, columns) -> weight: the inverse of `to_matrix`."""
    return matrix.t() if OPS[op].transposed else matrix.reshape(shape)


def call_macs(module: nn.Module, op: str, output: Tensor) -> int:
    """Multiply-accumulates of one call: every output element sums over the columns of its channel."""
    if not OPS[op].multiplies:
        return 0
    weight = cast(Tensor, module.weight)
    return output.numel() * matrix_shape(tuple(weight.shape), op)[1]
