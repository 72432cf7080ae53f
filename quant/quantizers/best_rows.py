"""Choosing among quantized matrices by the error that shows at the layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant.inputs import LayerInputs
from quant.packing import Encoded, decode, some_rows
from quant.quantizers.runs import runs

MARGIN = 1e-5
"""A later candidate wins only where it is better by more than the sums' rounding error."""


def best_rows(matrix: Tensor, candidates: Sequence[Encoded], inputs: LayerInputs) -> Encoded:
    """For each output channel the candidate with the least squared output error, the first one on a tie.

    Per tensor all channels share a scale, so one candidate is taken whole. All have one format.
    """
    weights = matrix.float()
    unit = weights.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    shared = candidates[0].fmt.granularity == "tensor"
    if shared:
        unit = unit.amax().reshape(1, 1)
    best, least = candidates[0], _errors(candidates[0], weights, unit, inputs, shared=shared)
    for other in candidates[1:]:
        errors = _errors(other, weights, unit, inputs, shared=shared)
        wins = errors < least * (1 - MARGIN)
        best, least = _merged(best, other, wins), torch.where(wins, errors, least)
    return best


def _errors(
    candidate: Encoded, weights: Tensor, unit: Tensor, inputs: LayerInputs, *, shared: bool
) -> Tensor:
    """(rows,), or (1,) where all rows go together; in units in which squares do not overflow."""
    rows, columns = weights.shape
    errors = weights.new_empty(rows)
    for part, groups in runs(rows, columns, inputs.groups):
        misses = decode(some_rows(candidate, part)).sub_(weights[part]).div_(unit if shared else unit[part])
        errors[part] = inputs.of(groups).output_errors(misses)
    return errors.sum(dim=0, keepdim=True) if shared else errors


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
