"""bfloat16 and half precision matrices and their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codecs.stored import Coded, Packed, own, row_blocks
from quant.plain import PlainFormat
from quant.storage import Format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def own_format(fmt: Format) -> PlainFormat:
    """The format as this codec's own. Raises ValueError for another family's."""
    return own(fmt, "plain", PlainFormat)


def nearest(matrix: Tensor, fmt: PlainFormat) -> Coded[PlainFormat]:
    """Round to nearest, ties to even; beyond the range the largest finite value is taken."""
    rows, columns = matrix.shape
    dtype = DTYPES[fmt.name]
    top = torch.finfo(dtype).max
    values = torch.empty((rows, 1, columns), dtype=dtype, device=matrix.device)
    for part in row_blocks(rows, columns):
        values[part, 0] = matrix[part].float().clamp(-top, top).to(dtype)
    return Coded(values, (), fmt, (rows, columns))


def closest(matrix: Tensor, fmt: PlainFormat) -> Coded[PlainFormat]:
    """`nearest`: there is no scale to choose."""
    return nearest(matrix, fmt)


def decode(coded: Coded[PlainFormat]) -> Tensor:
    """The float32 matrix that the stored values stand for."""
    return coded.values.float().reshape(coded.matrix)


def pack(coded: Coded[PlainFormat]) -> Packed[PlainFormat]:
    """Values -> their bytes, row by row, low byte first."""
    return Packed(coded.values.reshape(-1).view(torch.uint8), (), coded.fmt, coded.matrix)


def unpack(packed: Packed[PlainFormat]) -> Coded[PlainFormat]:
    """The inverse of `pack`."""
    rows, columns = packed.matrix
    values = packed.values.view(DTYPES[packed.fmt.name]).reshape(rows, 1, columns)
    return Coded(values, (), packed.fmt, packed.matrix)
