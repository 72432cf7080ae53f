"""AWQ's scaling (Lin et al. 2023, arXiv:2306.00978, section 3.2): columns with large inputs are multiplied
before they are rounded, so that they lose less, and divided afterwards.

The scale of a column is the root mean square of its inputs to the power of alpha (the paper takes the mean
of |x|), and alpha is the one of a grid with the least squared error at the layer's output. Then, as in the
paper's code, clipping ranges are tried, here for the output error of each channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.adjusted import Adjusted, ColumnScales, dequantized
from quant.catalog import Quantize
from quant.inputs import LayerInputs, required
from quant.integer import IntegerFormat
from quant.packing import Encoded, group, ungroup
from quant.quantizers import rtn
from quant.quantizers.best_rows import MARGIN, best_rows

ALPHAS = tuple(step / 10 for step in range(1, 11))
CLIPS = tuple(1 - step / 20 for step in range(1, 11))
FAINTEST = 1e-4
"""Inputs below this share of the mean count as that share."""


def quantize(
    weight_matrix: Tensor,
    fmt: IntegerFormat,
    inputs: LayerInputs | None = None,
    *,
    base: Quantize,
    parameter: int,
) -> Adjusted:
    """Round (output channels, columns) of finite floats, the columns scaled for the given inputs.

    `base` rounds; channels of integer formats take the nearest rounding within a clipped range instead where
    its output error is lower. One scale per column is shared by all channels. The matrix's squared output
    error is at most that of `base` alone and that of `rtn`. Raises InputsError without `inputs`.
    """
    rows, columns = weight_matrix.shape
    known = required(inputs, (rows, columns), "awq")
    scales = ColumnScales.of(torch.ones(columns, device=weight_matrix.device))
    best, least = _rounded(weight_matrix, fmt, known, scales, base)
    for alpha in ALPHAS:
        others = ColumnScales.of(column_scales(known, alpha))
        found, error = _rounded(weight_matrix, fmt, known, others, base)
        if bool(error < least * (1 - MARGIN)):
            best, least, scales = found, error, others
    return Adjusted(_clipped(weight_matrix, best, known, scales), scales)


def column_scales(inputs: LayerInputs, alpha: float) -> Tensor:
    """(columns,) root mean square inputs ** alpha, with a geometric mean of 1; the same for all groups.

    Columns that no input reached have the scale 1.
    """
    size = inputs.second_moments.diagonal(dim1=1, dim2=2).mean(dim=0).sqrt()
    reached = size > 0
    logs = size.maximum(size.mean() * FAINTEST).clamp(min=torch.finfo(torch.float32).tiny).log()
    mean = logs[reached].mean() if bool(reached.any()) else logs.mean()
    return torch.where(reached, (logs - mean) * alpha, 0.0).exp()


def _rounded(
    matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs, scales: ColumnScales, base: Quantize
) -> tuple[Encoded, Tensor]:
    """The scaled matrix, rounded by `base` or to nearest, and its squared output error over all channels."""
    found = best_rows(
        matrix, _both(scales.multiplied(matrix), fmt, inputs, scales, base), inputs, scales.restore
    )
    unit = torch.linalg.vector_norm(matrix, torch.inf).float().clamp(min=torch.finfo(torch.float32).tiny)
    error = scales.restore(dequantized(found)).sub_(matrix).div_(unit)
    return found, inputs.output_errors(error).double().sum()


def _both(
    scaled: Tensor, fmt: IntegerFormat, inputs: LayerInputs, scales: ColumnScales, base: Quantize
) -> list[Encoded]:
    return [base(scaled, fmt, scales.divided_inputs(inputs)), rtn.quantize(scaled, fmt)]


def _clipped(matrix: Tensor, best: Encoded, inputs: LayerInputs, scales: ColumnScales) -> Encoded:
    """`best`, or rounded to nearest within a range that is clipped for the output, channel by channel."""
    if best.fmt.family != "integer":
        return best
    for ratio in CLIPS:
        found = rtn.quantize(_within(scales.multiplied(matrix), best.fmt, ratio), best.fmt)
        best = best_rows(matrix, [best, found], inputs, scales.restore)
    return best


def _within(scaled: Tensor, fmt: IntegerFormat, ratio: float) -> Tensor:
    """The weights clamped to a share of the range of their tensor, channel or group."""
    grouped = group(scaled, fmt)
    dims = (0, 1, 2) if fmt.granularity == "tensor" else (2,)
    low, high = grouped.amin(dim=dims, keepdim=True) * ratio, grouped.amax(dim=dims, keepdim=True) * ratio
    rows, columns = scaled.shape
    return ungroup(grouped.clamp_(low, high), (rows, columns))
