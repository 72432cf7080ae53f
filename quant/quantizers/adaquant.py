"""AdaQuant (Hubara et al. 2021, arXiv:2006.10518): learn weights and scales on the layer's output error.

By Adam; the gradient passes straight through the rounding. The error is dW H dW' with the inputs' second
moments H, so there are no mini-batches and no random numbers, and every step is judged as it would be stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.inputs import LayerInputs, required
from quant.integer import IntegerFormat
from quant.packing import Encoded, some_rows, stored_scale
from quant.quantizers import gptq, mse_clip
from quant.quantizers.best_rows import best_of_parts
from quant.quantizers.grid import Stored
from quant.quantizers.learning import Piece, learned, parts

STEPS = 150
RATE = 0.05
"""Of weights, in grid steps."""
SCALE_RATE = 0.003
"""Of the logarithms of scales."""


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats for the given inputs.

    Learned from two starts, the nearest points of mse_clip's grid and what `gptq` found; each output channel
    keeps the better one, so none is worse than `gptq` or `rtn` at its output. Zero points stay, and so does
    a scale of the whole tensor. Raises InputsError without `inputs`.
    """
    rows, columns = weight_matrix.shape
    known = required(inputs, (rows, columns), "adaquant")
    fed_back = gptq.quantize(weight_matrix, fmt, known)
    nearest = Stored.of(mse_clip.quantize(weight_matrix, fmt))

    def candidates(part: slice, groups: slice) -> Iterator[Encoded]:
        starts = some_rows(fed_back, part), nearest.rounded(weight_matrix, part)
        yield starts[0]
        for start in starts:
            yield learned(weight_matrix[part], start, known.of(groups), partial(_learn, fmt=fmt))

    with torch.no_grad():
        pieces = parts(rows, columns, known.groups)
        return best_of_parts(weight_matrix, fmt, known, pieces, candidates, into=fed_back.values)


def _learn(piece: Piece, fmt: IntegerFormat) -> tuple[Tensor, Tensor]:
    """The best of every step, row by row."""
    low, high = piece.wide(piece.grid.low), piece.wide(piece.grid.high)
    scales, levels = piece.grid.scales, piece.levels
    place = piece.weights / piece.wide(scales)
    moves = torch.where(torch.maximum(torch.minimum(place.round(), high), low) == levels, 0.0, levels - place)
    growth = torch.zeros_like(scales)
    rates = (RATE, 0.0 if fmt.granularity == "tensor" else SCALE_RATE)
    optimizer = torch.optim.Adam(
        [{"params": [x], "lr": r} for x, r in zip((moves, growth), rates, strict=True)]
    )
    pull = 2 / piece.start_errors()
    best = Best(levels, scales)
    for step in range(STEPS + 1):
        stored = _stored(piece, scales * growth.exp(), fmt)
        wide = piece.wide(stored)
        nearest = (piece.weights / wide).add_(moves).round_()
        levels = torch.maximum(torch.minimum(nearest, high), low)
        errors = (levels * wide).sub_(piece.weights)
        slope = piece.at_output(errors)
        best.update(levels, stored, (slope * errors).sum(dim=1))
        inside = levels == nearest
        slope.mul_(pull).mul_(wide)
        growth.grad = _sums(slope * (levels - inside * piece.weights / wide), piece.grid.size)
        moves.grad = slope.mul_(inside)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.step()
    return best.levels, best.scales


class Best:
    """For each row the integers and scales with the least error so far."""

    def __init__(self, levels: Tensor, scales: Tensor) -> None:
        self.levels, self.scales = levels.to(torch.int16), scales
        self.errors = scales.new_full((len(scales),), torch.inf)

    def update(self, levels: Tensor, scales: Tensor, errors: Tensor) -> None:
        """Keep the rows that are better."""
        wins = errors < self.errors
        self.errors = torch.where(wins, errors, self.errors)
        self.levels[wins] = levels[wins].to(torch.int16)
        self.scales = torch.where(wins[:, None], scales, self.scales)


def _stored(piece: Piece, scales: Tensor, fmt: IntegerFormat) -> Tensor:
    return stored_scale(scales * piece.unit, fmt.scale_type).float() / piece.unit


def _sums(values: Tensor, size: int) -> Tensor:
    """(rows, columns) -> sums over each group (rows, groups)."""
    rows, columns = values.shape
    return pad(values, (0, -columns % size)).reshape(rows, -1, size).sum(dim=2)
