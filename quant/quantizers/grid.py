"""The points that stored scales and zero points span, for quantizers that choose among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.integer import IntegerFormat
from quant.packing import Encoded, encode


class Grid:
    """Per group of weights the scale and, less the zero point, the lowest and highest integer."""

    def __init__(self, scales: Tensor, low: Tensor, high: Tensor, size: int) -> None:
        self.scales, self.low, self.high, self.size = scales, low, high, size

    @classmethod
    def of(cls, encoded: Encoded) -> Grid:
        """The grid of stored scales: (rows, groups) each."""
        rows, groups, size = encoded.values.shape
        scales = encoded.scales.float().expand(rows, groups)
        points = torch.zeros_like(scales)
        if encoded.zero_points is not None:
            points = encoded.zero_points.float().expand(rows, groups)
        return cls(scales, encoded.fmt.lowest - points, encoded.fmt.highest - points, size)

    def wide(self, values: Tensor, columns: int) -> Tensor:
        """(rows, groups) -> (rows, columns): each weight's own."""
        return values.repeat_interleave(self.size, dim=1)[:, :columns]

    def rounded(self, values: Tensor, columns: Tensor) -> Tensor:
        """The nearest points of the grid to `values` (rows, n) in the given columns (n,)."""
        at = columns // self.size
        scales = self.scales[:, at]
        levels = (values / scales).round_()
        return torch.maximum(torch.minimum(levels, self.high[:, at]), self.low[:, at]) * scales


@dataclass(frozen=True)
class Stored:
    """Scales and zero points of a whole matrix, from which the nearest values of any rows follow."""

    fmt: IntegerFormat
    scales: Tensor
    zero_points: Tensor | None

    @classmethod
    def of(cls, encoded: Encoded) -> Stored:
        """Without the values."""
        return cls(encoded.fmt, encoded.scales, encoded.zero_points)

    def rounded(self, matrix: Tensor, part: slice) -> Encoded:
        """Some rows of the matrix (rows, columns), rounded to nearest."""
        own = slice(None) if self.fmt.granularity == "tensor" else part
        points = None if self.zero_points is None else self.zero_points[own]
        return encode(matrix[part], self.fmt, self.scales[own], points)
