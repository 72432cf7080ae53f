"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, section 4): columns whose inputs are large are multiplied
in the weight and divided in the input, so that both are easier to round.

Only schemes that round activations offer it: the division happens before the input is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.adjusted import Adjusted, ColumnScales
from quant.catalog import Quantize
from quant.inputs import InputsError, LayerInputs, required
from quant.integer import IntegerFormat


def quantize(
    weight_matrix: Tensor,
    fmt: IntegerFormat,
    inputs: LayerInputs | None = None,
    *,
    base: Quantize,
    parameter: int,
) -> Adjusted:
    """Round (output channels, columns) of finite floats with `base`, for inputs that the scales divide.

    `parameter` is the strength of the migration in percent. Raises InputsError without `inputs`.
    """
    rows, columns = weight_matrix.shape
    known = required(inputs, (rows, columns), "smoothquant")
    scales = migration(weight_matrix, known, parameter)
    return Adjusted(base(scales.multiplied(weight_matrix), fmt, scales.divided_inputs(known)), scales)


def migration(matrix: Tensor, inputs: LayerInputs, percent: int) -> ColumnScales:
    """max |x_j| ^ a / max |w_j| ^ (1 - a) for a = percent / 100, over their geometric mean (columns,).

    Columns without inputs or without weights have the scale 1. Raises InputsError where the statistics do
    not know the largest inputs.
    """
    if inputs.largest is None:
        raise InputsError(
            "Statistics for smoothquant must hold the largest input of each column. Got none. Collect them"
            " with the second moments."
        )
    share = percent / 100
    own = torch.linalg.vector_norm(matrix, torch.inf, dim=0).float()
    alive = (inputs.largest > 0) & (own > 0)
    if not bool(alive.any()):
        return ColumnScales.of(torch.ones_like(own))
    logs = share * inputs.largest.log() - (1 - share) * own.log()
    return ColumnScales.of(torch.where(alive, logs - logs[alive].mean(), 0.0).exp())
