"""Round to nearest over the full range (Jacob et al. 2018, arXiv:1712.05877, section 3)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from quant.formats import codec_of
from quant.inputs import LayerInputs
from quant.integer import IntegerFormat
from quant.packing import Encoded, encode, group, stored_scale


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats; other families than integers by their codec.

    Symmetric: scale = max |w| / (2^(bits-1) - 1). Asymmetric: the range from min(w, 0) to max(w, 0) is cut
    into 2^bits - 1 steps. Scales are rounded to their stored type before the weights are.
    """
    if fmt.family != "integer":
        return cast(Encoded, codec_of(fmt).nearest(weight_matrix, fmt))
    grouped = group(weight_matrix.float(), fmt)
    whole = fmt.granularity == "tensor"
    low = grouped.amin(dim=(0, 1, 2) if whole else -1).clamp(max=0)
    high = grouped.amax(dim=(0, 1, 2) if whole else -1).clamp(min=0)
    scales, zero_points = span(low, high, fmt)
    return encode(weight_matrix, fmt, scales, zero_points)


def span(low: Tensor, high: Tensor, fmt: IntegerFormat) -> tuple[Tensor, Tensor | None]:
    """Stored scales and zero points whose grid spans [low, high]; low <= 0 <= high, any shape.

    The zero point is an integer of the grid, so that 0 (and with it padding) is stored exactly.
    """
    if fmt.symmetric:
        return stored_scale(torch.maximum(-low, high) / fmt.highest, fmt.scale_type), None
    scales = stored_scale(high / fmt.highest - low / fmt.highest, fmt.scale_type)
    return scales, (-low / scales.float()).round().clamp(fmt.lowest, fmt.highest)
