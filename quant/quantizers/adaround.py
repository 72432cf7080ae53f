"""AdaRound (Nagel et al. 2020, arXiv:2004.10568): learn for every weight whether it is rounded up or down.

Each weight is its grid point below plus h in [0, 1], a rectified sigmoid of what Adam moves: first freely,
for the least output error, then under a regularizer that drives h to 0 or 1. The error is dW H dW' with the
second moments H of the inputs; its gradient is exact: there are no mini-batches and no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quant.inputs import LayerInputs, required
from quant.integer import IntegerFormat
from quant.packing import Encoded
from quant.quantizers import mse_clip, rtn
from quant.quantizers.best_rows import best_of_parts
from quant.quantizers.grid import Stored
from quant.quantizers.learning import Piece, learned, parts

STEPS = 200
RATE = 0.6
FREE = 0.2
"""Share of the steps without the regularizer, as in the paper."""
SHARPEST, FLATTEST = 20.0, 2.0
"""Exponents of the regularizer 1 - |2h - 1|^b, annealed from the first to the second."""
PRICE = 10.0
"""Of an undecided weight, in units of the mean error that a rounded weight brings to its output channel."""
STRETCH = 1.2
MARGIN = (STRETCH - 1) / 2


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats for the given inputs.

    Learned on mse_clip's scales; each output channel keeps that, or plain rounding where it has the smaller
    error at the output. Columns without input are rounded. Raises InputsError without `inputs`.
    """
    rows, columns = weight_matrix.shape
    known = required(inputs, (rows, columns), "adaround")
    starts = [Stored.of(quantizer.quantize(weight_matrix, fmt)) for quantizer in (mse_clip, rtn)]

    def candidates(part: slice, groups: slice) -> Iterator[Encoded]:
        plain = [start.rounded(weight_matrix, part) for start in starts]
        yield from plain
        yield learned(weight_matrix[part], plain[0], known.of(groups), _learn)

    with torch.no_grad():
        return best_of_parts(weight_matrix, fmt, known, parts(rows, columns, known.groups), candidates)


def _learn(piece: Piece) -> tuple[Tensor, Tensor]:
    scales, low, high = (piece.wide(of) for of in (piece.grid.scales, piece.grid.low, piece.grid.high))
    below = (piece.weights / scales).floor_()
    logits = _logits(piece.weights / scales - below)
    pull = scales * (2 / piece.start_errors())
    optimizer = torch.optim.Adam([logits], lr=RATE)
    for step in range(STEPS):
        soft = _rectified(logits)
        levels = below + soft
        inside = (levels >= low) & (levels <= high)
        levels = torch.maximum(torch.minimum(levels, high), low)
        slope = piece.at_output(levels.mul_(scales).sub_(piece.weights)).mul_(pull).mul_(inside)
        slope += _regularizer_slope(soft, step)
        logits.grad = slope.mul_(_rectified_slope(logits, soft))
        optimizer.step()
    levels = below.add_(_rectified(logits) >= 0.5)
    return torch.maximum(torch.minimum(levels, high), low), piece.grid.scales


def _logits(fraction: Tensor) -> Tensor:
    """Where the rectified sigmoid is the fraction."""
    return torch.logit((fraction.clamp(0, 1) + MARGIN) / STRETCH)


def _rectified(logits: Tensor) -> Tensor:
    return logits.sigmoid().mul_(STRETCH).sub_(MARGIN).clamp_(0, 1)


def _rectified_slope(logits: Tensor, soft: Tensor) -> Tensor:
    """0 where it is cut off at 0 or 1."""
    sigmoid = logits.sigmoid()
    return sigmoid.mul_(1 - sigmoid).mul_(STRETCH).mul_((soft > 0) & (soft < 1))


def _regularizer_slope(soft: Tensor, step: int) -> Tensor | float:
    """Slope of PRICE * (1 - |2h - 1|^b)."""
    progress = (step / STEPS - FREE) / (1 - FREE)
    if progress < 0:
        return 0.0
    power = FLATTEST + (SHARPEST - FLATTEST) * 0.5 * (1 + math.cos(math.pi * progress))
    side = 2 * soft - 1
    return side.abs().pow_(power - 1).mul_(side.sign_()).mul_(-2 * PRICE * power)
