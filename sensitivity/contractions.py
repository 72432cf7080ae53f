"""Products of a layer's gradient with schemes' errors, and of errors with themselves: at once where the
errors are kept, else piece by piece, so that there is no float32 copy of a large layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sensitivity.memory import PIECE
from sensitivity.weights import STACKED, LayerWeights


def inner(weights: LayerWeights, layer: str, schemes: Sequence[str], gradient: Tensor) -> list[float]:
    """g . dW of every scheme. On a CPU each is the same whatever others are asked for, kept or not."""
    errors = weights.errors(layer, schemes)
    if errors is not None:
        return _summed(errors.split(PIECE, dim=1), gradient)[: len(schemes)].tolist()  # type: ignore[no-untyped-call]
    found: list[float] = []
    for start in range(0, len(schemes), STACKED):
        own = schemes[start : start + STACKED]
        found += _summed(_stacks(weights, layer, own), gradient)[: len(own)].tolist()
    return found


def _summed(stacks: Iterable[Tensor], gradient: Tensor) -> Tensor:
    """Products (schemes,) of pieces of errors (schemes, piece) with the gradient, summed in float64."""
    flat, start, total = gradient.reshape(-1), 0, torch.zeros((), dtype=torch.float64)
    for stack in stacks:
        part = flat[start : start + stack.shape[1]].to(stack)
        total = total + (stack @ part).double().cpu()
        start += stack.shape[1]
    return total


def _stacks(weights: LayerWeights, layer: str, schemes: Sequence[str]) -> Iterator[Tensor]:
    """Pieces of the errors of up to four schemes, (4, piece), zeros where there are fewer."""
    for parts in zip(*(weights.error_pieces(layer, scheme, PIECE) for scheme in schemes), strict=True):
        stack = parts[0].new_zeros(STACKED, len(parts[0]))
        for row, part in enumerate(parts):
            stack[row] = part
        yield stack


def squared_error(weights: LayerWeights, layer: str, scheme: str) -> float:
    """||dW||^2, summed in float64."""
    return sum(float(e.double().square().sum()) for e in weights.error_pieces(layer, scheme, PIECE))


def squared_inner(weights: LayerWeights, layer: str, schemes: Sequence[str], gradient: Tensor) -> list[float]:
    """sum g^2 dW^2 of every scheme, in float64."""
    return [_squared_in_pieces(weights, layer, scheme, gradient) for scheme in schemes]


def _squared_in_pieces(weights: LayerWeights, layer: str, scheme: str, gradient: Tensor) -> float:
    pieces = _pieces(weights, layer, scheme, gradient)
    return sum(float((part * error).double().square().sum()) for part, error in pieces)


def _pieces(
    weights: LayerWeights, layer: str, scheme: str, gradient: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of g and dW, flat, in at least float32."""
    flat = gradient.reshape(-1)
    start = 0
    for error in weights.error_pieces(layer, scheme, PIECE):
        yield flat[start : start + len(error)].to(error.dtype), error
        start += len(error)
