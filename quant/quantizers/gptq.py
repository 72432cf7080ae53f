"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round column by column, and let the columns that are still to
come make up for the error as it shows at the layer's output.

The columns go in the order of their inputs' second moments ("act-order"); scales and zero points are chosen
before, per tensor, channel or group of the stored columns, so that the stored form is that of any quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from quant.inputs import LayerInputs, required
from quant.integer import IntegerFormat
from quant.packing import Encoded, encode, some_rows
from quant.quantizers import mse_clip, rtn
from quant.quantizers.best_rows import best_of_parts
from quant.quantizers.grid import Grid, Stored
from quant.quantizers.runs import runs

DAMPING = 0.01
"""Share of the mean second moment that is added to each, as in the paper."""
MOST_DAMPING = 10.0
BLOCK = 128
"""Columns whose errors are gathered before they reach the columns behind them."""
FEW, SHARE = 1 << 20, 16
"""Weights that are taken at once; more where a sixteenth of the rows is more."""


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats for the given inputs.

    Two sets of scales are tried, mse_clip's and the full range's, and plain rounding beside them; each output
    channel keeps what has the least squared error at its output, so none is worse than `rtn` there. Columns
    without input are rounded, a layer without any as mse_clip does. Raises InputsError without `inputs`.
    """
    rows, columns = weight_matrix.shape
    known = required(inputs, (rows, columns), "gptq")
    starts = [Stored.of(quantizer.quantize(weight_matrix, fmt)) for quantizer in (mse_clip, rtn)]

    @lru_cache(maxsize=1)
    def solved(index: int) -> tuple[Tensor, Tensor]:
        """The order of the columns, and the factor of the moments of one group."""
        moments = known.second_moments[index]
        order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        return order, inverse_factor(moments[order][:, order])

    def candidates(part: slice, groups: slice) -> Iterator[Encoded]:
        plain = [start.rounded(weight_matrix, part) for start in starts]
        yield from plain
        yield from _fed_back(weight_matrix[part], plain, groups, solved)

    parts = list(runs(rows, columns, known.groups, few=FEW, share=SHARE))
    return best_of_parts(weight_matrix, fmt, known, parts, candidates)


def _fed_back(
    rows: Tensor, starts: Sequence[Encoded], groups: slice, solved: Callable[[int], tuple[Tensor, Tensor]]
) -> list[Encoded]:
    """Some rows on the grid of each start with error feedback, equal runs of them for each group."""
    found = [replace(start, values=torch.empty_like(start.values)) for start in starts]
    height = len(rows) // (groups.stop - groups.start)
    for at, index in enumerate(range(groups.start, groups.stop)):
        run, (order, factor) = slice(at * height, (at + 1) * height), solved(index)
        for start, whole in zip(starts, found, strict=True):
            own = some_rows(start, run)
            done = round_with_feedback(rows[run, order].float(), order, Grid.of(own), factor)
            rounded = torch.empty_like(done)
            rounded[:, order] = done
            whole.values[run] = encode(rounded, own.fmt, own.scales, own.zero_points).values
    return found


def round_with_feedback(left: Tensor, columns: Tensor, grid: Grid, factor: Tensor) -> Tensor:
    """Algorithm 1 of the paper on `left` (rows, n), whose column i is stored as columns[i]; in its memory."""
    for start in range(0, left.shape[1], BLOCK):
        end = min(start + BLOCK, left.shape[1])
        errors = left.new_empty(left.shape[0], end - start)
        for at in range(start, end):
            done = grid.rounded(left[:, at : at + 1], columns[at : at + 1])
            errors[:, at - start] = (left[:, at] - done[:, 0]) / factor[at, at]
            left[:, at : at + 1] = done
            left[:, at + 1 : end] -= torch.outer(errors[:, at - start], factor[at, at + 1 : end])
        left[:, end:] -= errors @ factor[start:end, end:]
    return left


def inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with U'U = (H + damping)^-1, float32, for second moments H (n, n).

    Inputs that are always 0 get the moment 1: their columns are rounded and disturb no other. Damping
    grows tenfold until the factorization succeeds.
    """
    exact = moments.double()
    diagonal = exact.diagonal().clone()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    exact /= mean
    exact.diagonal().add_(dead)
    damping = DAMPING
    while damping <= MOST_DAMPING:
        upper = _inverse_factor(exact, damping)
        if upper is not None:
            return upper
        damping *= 10
    return torch.eye(len(exact), device=exact.device)


def _inverse_factor(exact: Tensor, damping: float) -> Tensor | None:
    """The factor of the damped matrix; None where it is not positive. Holds three copies at most."""
    damped = exact.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()
