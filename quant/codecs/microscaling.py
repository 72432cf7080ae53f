"""MXFP4, MXFP8 and NVFP4 matrices: nearest and closest block scales, codes, and their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codecs.elements import codes, values
from quant.codecs.scan import Groups, best, pick
from quant.codecs.stored import Coded, Packed, grouped, largest, own, row_blocks, ungrouped
from quant.elements import ELEMENTS
from quant.microscaling import BlockFormat
from quant.packing import pack_bits, unpack_bits
from quant.storage import Format

E4M3 = ELEMENTS["e4m3"]
BIAS = 127
"""e8m0 code 0 is 2^-127; code 255 is not a number and never written."""
MX_STEPS = (0, 1, -1)
NV_STEPS = (0, *range(1, 8), *range(-1, -7, -1))
"""Neighbors tried: codes of the scale, relative to the one that covers the block."""


def own_format(fmt: Format) -> BlockFormat:
    """The format as this codec's own. Raises ValueError for another family's."""
    return own(fmt, "microscaling", BlockFormat)


def nearest(matrix: Tensor, fmt: BlockFormat) -> Coded[BlockFormat]:
    """Round to nearest. MX: 2^(floor(log2 max|w|) - largest exponent), as the OCP specification says.

    NVFP4: the tensor scale is max|w| / (448 * 6), a block's is max|w| / 6 in units of it, rounded to e4m3.
    """
    return encode(matrix, fmt, *_covering(matrix, fmt))


def closest(matrix: Tensor, fmt: BlockFormat) -> Coded[BlockFormat]:
    """The block scales with the least squared error; never worse than `nearest` in any block."""
    covering, tensor_scale = _covering(matrix, fmt)
    steps = MX_STEPS if fmt.scale == "e8m0" else NV_STEPS
    top = 254 if fmt.scale == "e8m0" else 126
    found = torch.empty_like(covering)
    for part in row_blocks(*matrix.shape):
        weights = Groups(grouped(matrix[part], fmt).flatten(0, 1), fmt.element)
        first = covering[part].reshape(-1).int()
        candidates = torch.stack([(first + step).clamp(0, top) for step in steps]).to(torch.uint8)
        errors = weights.errors(_steps(candidates, tensor_scale).clamp(min=2.0**-126))
        found[part] = pick(candidates, best(errors)).reshape(found[part].shape)
    return encode(matrix, fmt, found, tensor_scale)


def _covering(matrix: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor | None]:
    """uint8 codes of the block scales, (rows, blocks), and the tensor scale of NVFP4, (1,)."""
    top = largest(matrix, fmt)
    if fmt.scale == "e8m0":
        exponent = torch.frexp(top).exponent - 1 - fmt.element.highest_exponent
        return torch.where(top > 0, exponent + BIAS, 0).clamp(0, 254).to(torch.uint8), None
    tensor_scale = (top.amax() / (E4M3.highest * fmt.element.highest)).clamp(min=2.0**-126).reshape(1)
    return codes(top / fmt.element.highest / tensor_scale, E4M3), tensor_scale


def _steps(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Scale codes -> what a value of 1 stands for."""
    if tensor_scale is not None:
        return values(scales, E4M3).mul_(tensor_scale)
    return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.int() - BIAS)


def encode(
    matrix: Tensor, fmt: BlockFormat, scales: Tensor, tensor_scale: Tensor | None
) -> Coded[BlockFormat]:
    """Round a float matrix to the values that stored scales span; a scale of 0 stores zeros."""
    rows, columns = matrix.shape
    shape = fmt.grouped_shape((rows, columns))
    coded = torch.empty(shape, dtype=torch.uint8, device=matrix.device)
    for part in row_blocks(rows, columns):
        steps = _steps(scales[part], tensor_scale).unsqueeze(-1)
        numbers = grouped(matrix[part], fmt) / steps
        coded[part] = codes(torch.where(steps > 0, numbers, 0.0), fmt.element)
    kept = (scales,) if tensor_scale is None else (scales, tensor_scale)
    return Coded(coded, kept, fmt, (rows, columns))


def decode(coded: Coded[BlockFormat]) -> Tensor:
    """The float32 matrix that the stored codes stand for."""
    rows, columns = coded.matrix
    tensor_scale = coded.scales[1] if len(coded.scales) > 1 else None
    result = torch.empty(coded.matrix, device=coded.values.device)
    for part in row_blocks(rows, columns):
        numbers = values(coded.values[part], coded.fmt.element)
        numbers.mul_(_steps(coded.scales[0][part], tensor_scale).unsqueeze(-1))
        result[part] = ungrouped(numbers, (numbers.shape[0], columns))
    return result


def pack(coded: Coded[BlockFormat]) -> Packed[BlockFormat]:
    """Codes -> a bit stream without gaps, row by row; the first of two 4-bit codes fills the low half."""
    return Packed(pack_bits(coded.values, coded.fmt.weight_bits), coded.scales, coded.fmt, coded.matrix)


def unpack(packed: Packed[BlockFormat]) -> Coded[BlockFormat]:
    """The inverse of `pack`."""
    shape = packed.fmt.grouped_shape(packed.matrix)
    coded = unpack_bits(packed.values, packed.fmt.weight_bits, shape[0] * shape[1] * shape[2])
    return Coded(coded.reshape(shape), packed.scales, packed.fmt, packed.matrix)
