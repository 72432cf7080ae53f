"""FP8, FP4 and NF4 matrices: nearest and closest scales, codes, and their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.codecs.elements import codes, values
from quant.codecs.scan import Groups, best, pick
from quant.codecs.stored import Coded, Packed, grouped, largest, own, row_blocks, ungrouped
from quant.floating import FloatFormat
from quant.packing import SCALE_DTYPES, pack_bits, stored_scale, unpack_bits
from quant.storage import Format

FACTORS = tuple(2 ** (step / 8) for step in (0, *(step for step in range(-8, 4) if step)))
"""Scales tried, times the one that covers the full range, which comes first."""
FINE = tuple(1 + step / 96 for step in (0, -3, -2, -1, 1, 2, 3))
FITS = 2


def own_format(fmt: Format) -> FloatFormat:
    """The format as this codec's own. Raises ValueError for another family's."""
    return own(fmt, "float", FloatFormat)


def nearest(matrix: Tensor, fmt: FloatFormat) -> Coded[FloatFormat]:
    """Round to nearest with scales max |w| / (largest value of the type)."""
    return encode(matrix, fmt, _covering(matrix, fmt))


def closest(matrix: Tensor, fmt: FloatFormat) -> Coded[FloatFormat]:
    """The scales with the least squared error; never worse than `nearest`."""
    full = _covering(matrix, fmt)
    if fmt.granularity == "tensor":
        return encode(matrix, fmt, _search(matrix.reshape(1, -1).float(), fmt, full.reshape(-1)))
    found = []
    for part in row_blocks(*matrix.shape):
        groups = grouped(matrix[part], fmt)
        found.append(_search(groups.flatten(0, 1), fmt, full[part].reshape(-1)))
    return encode(matrix, fmt, torch.cat(found))


def _covering(matrix: Tensor, fmt: FloatFormat) -> Tensor:
    top = largest(matrix, fmt)
    if fmt.granularity == "tensor":
        top = top.amax().reshape(1, 1)
    return stored_scale(top / fmt.element.highest, fmt.scale_type)


def _search(groups: Tensor, fmt: FloatFormat, full: Tensor) -> Tensor:
    """(count, size) weights and covering scales -> stored scales, (count,)."""
    weights = Groups(groups, fmt.element)
    chosen = full
    for factors in (FACTORS, FINE):
        tried = torch.stack([chosen.float() * factor for factor in factors])
        candidates = stored_scale(tried, fmt.scale_type)
        chosen = pick(candidates, best(weights.errors(candidates.float())))
    for _ in range(FITS):
        fitted = stored_scale(weights.fitted(chosen.float()), fmt.scale_type)
        candidates = torch.stack((chosen, fitted))
        chosen = pick(candidates, best(weights.errors(candidates.float())))
    return chosen


def encode(matrix: Tensor, fmt: FloatFormat, scales: Tensor) -> Coded[FloatFormat]:
    """Round a float matrix to the values that stored scales span."""
    rows, columns = matrix.shape
    shape, scales_shape = fmt.grouped_shape((rows, columns)), fmt.scales_shape((rows, columns))
    scales = scales.reshape(scales_shape).to(SCALE_DTYPES[fmt.scale_type])
    steps = scales.float().expand(shape[:2]).unsqueeze(-1)
    coded = torch.empty(shape, dtype=torch.uint8, device=matrix.device)
    for part in row_blocks(rows, columns):
        coded[part] = codes(grouped(matrix[part], fmt) / steps[part], fmt.element)
    return Coded(coded, (scales,), fmt, (rows, columns))


def decode(coded: Coded[FloatFormat]) -> Tensor:
    """The float32 matrix that the stored codes stand for."""
    (scales,) = coded.scales
    rows, columns = coded.matrix
    steps = scales.float().expand(coded.values.shape[:2]).unsqueeze(-1)
    result = torch.empty(coded.matrix, device=coded.values.device)
    for part in row_blocks(rows, columns):
        numbers = values(coded.values[part], coded.fmt.element).mul_(steps[part])
        result[part] = ungrouped(numbers, (numbers.shape[0], columns))
    return result


def pack(coded: Coded[FloatFormat]) -> Packed[FloatFormat]:
    """Codes -> a bit stream without gaps, row by row; the first of two 4-bit codes fills the low half."""
    return Packed(pack_bits(coded.values, coded.fmt.weight_bits), coded.scales, coded.fmt, coded.matrix)


def unpack(packed: Packed[FloatFormat]) -> Coded[FloatFormat]:
    """The inverse of `pack`."""
    shape = packed.fmt.grouped_shape(packed.matrix)
    coded = unpack_bits(packed.values, packed.fmt.weight_bits, shape[0] * shape[1] * shape[2])
    return Coded(coded.reshape(shape), packed.scales, packed.fmt, packed.matrix)
