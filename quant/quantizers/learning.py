"""Learning quantized weights on the output error dW H dW', a few rows of the matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.inputs import LayerInputs
from quant.packing import Encoded
from quant.quantizers.grid import Grid
from quant.quantizers.runs import runs

SHARE = 48
"""Of the rows, where that is more than a few weights: learning holds a dozen copies of its rows."""


@dataclass(frozen=True)
class Piece:
    """Rows that are learned together, in units of each row's largest |weight|.

    `weights` is (rows, columns), `levels` the integers less the zero point to start at, `grid` spans what may
    be stored, `moments` is (n, columns, columns) for n equal runs of the rows, `unit` (rows, 1) is what
    weights and scales were divided by.
    """

    weights: Tensor
    levels: Tensor
    grid: Grid
    moments: Tensor
    unit: Tensor

    @classmethod
    def of(cls, weights: Tensor, levels: Tensor, grid: Grid, moments: Tensor) -> Piece:
        """The piece of some rows of a matrix, where they start and what they may become."""
        unit = weights.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        scaled = Grid(grid.scales / unit, grid.low, grid.high, grid.size)
        return cls(weights / unit, levels, scaled, moments, unit)

    def wide(self, values: Tensor) -> Tensor:
        """(rows, groups) -> (rows, columns)."""
        return self.grid.wide(values, self.weights.shape[1])

    def at_output(self, errors: Tensor) -> Tensor:
        """Errors of weights (rows, columns), times the second moments of the inputs."""
        runs, columns = self.moments.shape[:2]
        return torch.bmm(errors.reshape(runs, -1, columns), self.moments).reshape(errors.shape)

    def start_errors(self) -> Tensor:
        """(rows, 1): output error of the start, per column: what gradients are measured in."""
        errors = self.levels * self.wide(self.grid.scales) - self.weights
        found = (self.at_output(errors) * errors).sum(dim=1, keepdim=True) / errors.shape[1]
        return found.clamp(min=torch.finfo(found.dtype).tiny)


Learn = Callable[[Piece], tuple[Tensor, Tensor]]
"""Piece -> integers less the zero point (rows, columns), and scales (rows, groups) in the piece's unit."""


def learned(rows: Tensor, start: Encoded, inputs: LayerInputs, learn: Learn) -> Encoded:
    """What `learn` makes of `start`, which encodes all these rows; zero points stay.

    Scales of a whole tensor must stay too, because they belong to other rows as well.
    """
    columns, grid = rows.shape[1], Grid.of(start)
    values, scales = start.values.clone(), start.scales
    flat = values.view(len(rows), -1)[:, :columns]
    points = start.fmt.lowest - grid.wide(grid.low, columns)
    piece = Piece.of(rows.float(), flat - points, grid, inputs.second_moments)
    levels, found = learn(piece)
    flat.copy_((levels + points).to(values.dtype))
    if start.fmt.granularity != "tensor":
        scales = (found * piece.unit).to(scales.dtype)
    return replace(start, values=values, scales=scales)


def parts(rows: int, columns: int, groups: int) -> list[tuple[slice, slice]]:
    """Rows that are learned together, with the groups of inputs they belong to."""
    return list(runs(rows, columns, groups, share=SHARE))
