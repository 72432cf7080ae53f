"""Choosing among quantized matrices by the error that shows at the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant.adjusted import dequantized
from quant.inputs import LayerInputs
from quant.packing import Encoded, some_rows
from quant.quantizers.runs import runs

MARGIN = 1e-5
"""A later candidate wins only where it is better by more than the sums' rounding error."""


def best_rows(
    matrix: Tensor,
    candidates: Sequence[Encoded],
    inputs: LayerInputs,
    restore: Callable[[Tensor], Tensor] = lambda decoded: decoded,
) -> Encoded:
    """For each output channel the candidate with the least squared output error, the first one on a tie.

    Where channels share a scale, and in formats beyond integers, one candidate is taken whole. All have one
    format; `restore` makes weights of some rows' decoded values, in their memory.
    """
    fmt = candidates[0].fmt
    shared = fmt.family != "integer" or fmt.granularity == "tensor"
    dims = (0, 1) if shared else (1,)
    unit = torch.linalg.vector_norm(matrix, torch.inf, dim=dims, keepdim=True).float()
    unit.clamp_(min=torch.finfo(torch.float32).tiny)

    def errors(candidate: Encoded) -> Tensor:
        """(rows,), or (1,) where all rows go together; in units in which squares do not overflow."""
        whole = None if fmt.family == "integer" else dequantized(candidate)
        rows, columns = matrix.shape
        found = torch.empty(rows, device=matrix.device)
        for part, groups in runs(rows, columns, inputs.groups):
            decoded = dequantized(some_rows(candidate, part)) if whole is None else whole[part]
            misses = restore(decoded).sub_(matrix[part]).div_(unit if shared else unit[part])
            found[part] = inputs.of(groups).output_errors(misses)
        return found.sum(dim=0, keepdim=True) if shared else found

    best, least = candidates[0], errors(candidates[0])
    for other in candidates[1:]:
        found = errors(other)
        wins = found < least * (1 - MARGIN)
        least = torch.where(wins, found, least)
        if not shared:
            best = _merged(best, other, wins)
        elif bool(wins):
            best = other
    return best


def _merged(first: Encoded, second: Encoded, wins: Tensor) -> Encoded:
    points = None
    if first.zero_points is not None and second.zero_points is not None:
        points = torch.where(wins[:, None], second.zero_points, first.zero_points)
    return replace(
        first,
        values=torch.where(wins[:, None, None], second.values, first.values),
        scales=torch.where(wins[:, None], second.scales, first.scales),
        zero_points=points,
    )
