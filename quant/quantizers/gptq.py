"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round column by column, and let the columns that are still to
come make up for the error as it shows at the layer's output.

The columns go in the order of their inputs' second moments ("act-order"); scales and zero points are chosen
before, per tensor, channel or group of the stored columns, so that the stored form is that of any quantizer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.inputs import LayerInputs, required
from quant.integer import IntegerFormat
from quant.packing import Encoded, encode, some_rows
from quant.quantizers import mse_clip, rtn
from quant.quantizers.best_rows import best_rows
from quant.quantizers.grid import Grid

DAMPING = 0.01
"""Share of the mean second moment that is added to each, as in the paper."""
MOST_DAMPING = 10.0
BLOCK = 128
"""Columns whose errors are gathered before they reach the columns behind them."""
FEW, SHARE = 1 << 20, 8
"""Weights that are taken at once; more where an eighth of the rows is more."""


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats for the given inputs.

    Two sets of scales are tried, mse_clip's and the full range's, and plain rounding beside them; each output
    channel keeps what has the least squared error at its output, so none is worse than `rtn` there. Columns
    without input are rounded, a layer without any as mse_clip does. Raises InputsError without `inputs`.
    """
    rows, columns = weight_matrix.shape
    known = required(inputs, (rows, columns), "gptq")
    plain = [quantizer.quantize(weight_matrix, fmt) for quantizer in (mse_clip, rtn)]
    return best_rows(weight_matrix, [*plain, *_fed_back(weight_matrix, plain, known)], known)


def _fed_back(matrix: Tensor, starts: list[Encoded], inputs: LayerInputs) -> list[Encoded]:
    """The matrix on the grid of each start, with error feedback; the factor of the moments serves them all.

    Rows do not depend on each other, so a few are taken at a time, which bounds the temporary memory.
    """
    height = matrix.shape[0] // inputs.groups
    step = max(1, FEW // matrix.shape[1], -(-height // SHARE))
    found = [(start, Grid.of(start), torch.empty_like(start.values)) for start in starts]
    for index, moments in enumerate(inputs.second_moments):
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        factor = inverse_factor(moments[order][:, order])
        end = (index + 1) * height
        for at in range(index * height, end, step):
            part = slice(at, min(at + step, end))
            rows = matrix[part, order].float()
            for start, grid, values in found:
                rounded = torch.empty_like(rows)
                rounded[:, order] = round_with_feedback(rows, order, grid.rows(part), factor)
                own = some_rows(start, part)
                values[part] = encode(rounded, own.fmt, own.scales, own.zero_points).values
    return [replace(start, values=values) for start, _, values in found]


def round_with_feedback(matrix: Tensor, columns: Tensor, grid: Grid, factor: Tensor) -> Tensor:
    """Algorithm 1 of the paper on `matrix` (rows, n), whose column i is stored as columns[i]."""
    left = matrix.clone()
    done = torch.empty_like(matrix)
    for start in range(0, matrix.shape[1], BLOCK):
        end = min(start + BLOCK, matrix.shape[1])
        errors = left.new_empty(matrix.shape[0], end - start)
        for at in range(start, end):
            done[:, at : at + 1] = grid.rounded(left[:, at : at + 1], columns[at : at + 1])
            errors[:, at - start] = (left[:, at] - done[:, at]) / factor[at, at]
            left[:, at + 1 : end] -= torch.outer(errors[:, at - start], factor[at, at + 1 : end])
        left[:, end:] -= errors @ factor[start:end, end:]
    return done


def inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with U'U = (H + damping)^-1, float32, for second moments H (n, n).

    Inputs that are always 0 get the moment 1: their columns are rounded and disturb no other. Damping
    grows tenfold until the factorization succeeds.
    """
    exact = moments.double()
    diagonal = exact.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    exact = exact / mean + torch.diag(dead.to(exact.dtype))
    eye = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    damping = DAMPING
    while damping <= MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(exact + damping * eye)
        if not int(failed):
            upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return upper.float()
        damping *= 10
    return eye.float()
