"""Choosing among quantized matrices by the error that shows at the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from quant.adjusted import dequantized
from quant.inputs import LayerInputs
from quant.integer import IntegerFormat
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


Candidates = Callable[[slice, slice], Iterable[Encoded]]
"""Some rows, and the groups of inputs they belong to -> what there is for them, in the same order for all."""


def best_of_parts(
    matrix: Tensor,
    fmt: IntegerFormat,
    inputs: LayerInputs,
    parts: Sequence[tuple[slice, slice]],
    candidates: Candidates,
    into: Tensor | None = None,
) -> Encoded:
    """As `best_rows` for integer formats, where candidates are made and compared a few rows at a time.

    Only the best is held whole, its values in the memory of `into` if given: rows are written after they
    were asked for. Where all rows share a scale the winner is known at the end, and made again.
    """
    if fmt.granularity == "tensor":
        winner = _least_error(matrix, inputs, parts, candidates)
        found = (next(islice(candidates(part, groups), winner, None)) for part, groups in parts)
    else:
        found = (
            best_rows(matrix[part], list(candidates(part, groups)), inputs.of(groups))
            for part, groups in parts
        )
    return _joined(found, parts, (matrix.shape[0], matrix.shape[1]), into)


def _least_error(
    matrix: Tensor, inputs: LayerInputs, parts: Sequence[tuple[slice, slice]], candidates: Candidates
) -> int:
    unit = torch.linalg.vector_norm(matrix, torch.inf).float().clamp(min=torch.finfo(torch.float32).tiny)
    totals: dict[int, float] = {}
    for part, groups in parts:
        known = inputs.of(groups)
        for index, candidate in enumerate(candidates(part, groups)):
            misses = dequantized(candidate).sub_(matrix[part]).div_(unit)
            totals[index] = totals.get(index, 0.0) + known.output_errors(misses).double().sum().item()
    best = 0
    for index, total in totals.items():
        if total < totals[best] * (1 - MARGIN):
            best = index
    return best


def _joined(
    pieces: Iterable[Encoded],
    parts: Sequence[tuple[slice, slice]],
    matrix: tuple[int, int],
    whole: Tensor | None,
) -> Encoded:
    """Runs of rows, one after the other, as one matrix; one scale of all rows is that of each."""
    scales, points = [], []
    for (part, _), piece in zip(parts, pieces, strict=True):
        if whole is None:
            whole = piece.values.new_empty(piece.fmt.grouped_shape(matrix))
        whole[part] = piece.values
        scales.append(piece.scales)
        if piece.zero_points is not None:
            points.append(piece.zero_points)
    assert whole is not None, "a matrix has rows"
    shared = piece.fmt.granularity == "tensor"
    return replace(
        piece,
        values=whole,
        scales=scales[0] if shared else torch.cat(scales),
        zero_points=None if not points else points[0] if shared else torch.cat(points),
        matrix=matrix,
    )
