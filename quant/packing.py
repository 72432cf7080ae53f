"""Inverse pairs between a weight matrix and its packed bytes.

matrix --group--> (rows, groups, size) --encode--> Encoded --pack--> Packed, and back with unpack, decode,
ungroup. Dequantized weights are computed from what is stored, so they equal what a runtime reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.integer import IntegerFormat, ScaleType
from quant.storage import Format, Matrix

SCALE_DTYPES: dict[ScaleType, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
SMALLEST_SCALE: dict[ScaleType, float] = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
}
BLOCK = 1 << 18
"""Values handled at once where a whole matrix would need too much temporary memory."""


@dataclass(frozen=True)
class Encoded:
    """Stored integers with their scales.

    `values`: (rows, groups, size), int8 (symmetric) or uint8 (asymmetric), padding included. `scales`: in
    the format's scale type, (1, 1) per tensor, else (rows, groups). `zero_points`: uint8, shaped as scales,
    None for symmetric formats. `matrix`: (rows, columns) without padding.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    fmt: IntegerFormat
    matrix: Matrix


@dataclass(frozen=True)
class Packed:
    """What is stored: 1-D uint8 streams of values and zero points, and the scales in their own type."""

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    fmt: IntegerFormat
    matrix: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; equal to `fmt.storage(matrix).bytes`."""
        tensors = (self.values, self.scales, self.zero_points)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def group(matrix: Tensor, fmt: IntegerFormat) -> Tensor:
    """(rows, columns) -> (rows, groups, size); the last group of each row is padded with zeros."""
    rows, columns = matrix.shape
    shape = fmt.grouped_shape((rows, columns))
    missing = shape[1] * shape[2] - columns
    return (pad(matrix, (0, missing)) if missing else matrix).reshape(shape)


def ungroup(grouped: Tensor, matrix: Matrix) -> Tensor:
    """(rows, groups, size) -> (rows, columns): the inverse of `group`, padding dropped."""
    rows, columns = matrix
    return grouped.reshape(rows, -1)[:, :columns]


def stored_scale(scale: Tensor, scale_type: ScaleType) -> Tensor:
    """Scales as they are stored: rounded to the scale type, kept positive and finite.

    A scale below the smallest stored number (an all-zero channel, a tiny one) becomes that number; one
    above the largest becomes the largest, and the values saturate.
    """
    dtype = SCALE_DTYPES[scale_type]
    return scale.clamp(SMALLEST_SCALE[scale_type], torch.finfo(dtype).max).to(dtype)


def encode(matrix: Tensor, fmt: IntegerFormat, scales: Tensor, zero_points: Tensor | None) -> Encoded:
    """Round a float matrix to the grid that stored scales (and zero points) span.

    Halves round to even. Raises ValueError when the zero points do not fit the format's symmetry.
    """
    if fmt.symmetric != (zero_points is None):
        raise ValueError(
            "Zero points must be given for asymmetric formats, and only then."
            f" Got {'none' if zero_points is None else 'some'} for {fmt.name}. Correct the quantizer."
        )
    rows, columns = matrix.shape
    shape = fmt.scales_shape((rows, columns))
    dtype = torch.int8 if fmt.symmetric else torch.uint8
    values = torch.empty(fmt.grouped_shape((rows, columns)), dtype=dtype, device=matrix.device)
    wide = scales.reshape(*shape, 1).float()
    points = None if zero_points is None else zero_points.reshape(*shape, 1)
    for part in row_blocks(rows, columns):
        own = slice(None) if fmt.granularity == "tensor" else part
        levels = (group(matrix[part].float(), fmt) / wide[own]).round_()
        if points is not None:
            levels.add_(points[own])
        values[part] = levels.clamp_(fmt.lowest, fmt.highest).to(dtype)
    return Encoded(
        values,
        scales.reshape(shape).to(SCALE_DTYPES[fmt.scale_type]),
        None if zero_points is None else zero_points.reshape(shape).to(torch.uint8),
        fmt,
        (rows, columns),
    )


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Runs of rows that hold about BLOCK values each: temporary memory stays that of one run."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def decode(encoded: Encoded) -> Tensor:
    """The float32 matrix that the stored integers stand for."""
    rows, columns = encoded.matrix
    matrix = torch.empty(encoded.matrix, device=encoded.values.device)
    scales, points = encoded.scales.unsqueeze(-1).float(), encoded.zero_points
    for part in row_blocks(rows, columns):
        own = slice(None) if encoded.fmt.granularity == "tensor" else part
        values = encoded.values[part].float()
        if points is not None:
            values.sub_(points[own].unsqueeze(-1))
        matrix[part] = ungroup(values.mul_(scales[own]), (len(values), columns))
    return matrix


def some_rows(encoded: Encoded, part: slice) -> Encoded:
    """The rows of `part`, as a matrix of their own that shares memory."""
    own = slice(None) if encoded.fmt.granularity == "tensor" else part
    points = encoded.zero_points
    return replace(
        encoded,
        values=encoded.values[part],
        scales=encoded.scales[own],
        zero_points=None if points is None else points[own],
        matrix=(len(encoded.values[part]), encoded.matrix[1]),
    )


def pack(encoded: Encoded) -> Packed:
    """Stored integers -> bit streams without gaps, row by row."""
    points = encoded.zero_points
    return Packed(
        values=pack_bits(encoded.values, encoded.fmt.bits),
        scales=encoded.scales,
        zero_points=None if points is None else pack_bits(points, encoded.fmt.bits),
        fmt=encoded.fmt,
        matrix=encoded.matrix,
    )


def unpack(packed: Packed) -> Encoded:
    """The inverse of `pack`."""
    fmt, shape = packed.fmt, packed.fmt.grouped_shape(packed.matrix)
    values = unpack_bits(packed.values, fmt.bits, shape[0] * shape[1] * shape[2])
    if fmt.symmetric:
        half = 1 << (fmt.bits - 1)
        values = ((values.to(torch.int16) ^ half) - half).to(torch.int8)
    points = packed.zero_points
    if points is not None:
        points = unpack_bits(points, fmt.bits, packed.scales.numel()).reshape(packed.scales.shape)
    return Encoded(values.reshape(shape), packed.scales, points, fmt, packed.matrix)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers -> 1-D uint8 stream of their lowest `bits` bits; value 0 fills the lowest bits of byte 0.

    >>> pack_bits(torch.tensor([1, 2, 3]), 3).tolist()
    [209, 0]
    """
    count = values.numel()
    stream = torch.empty(-(-count * bits // 8), dtype=torch.uint8, device=values.device)
    flat = values.reshape(-1)
    for start in range(0, count, BLOCK):
        piece = _pack_piece(flat[start : start + BLOCK], bits)
        first = start * bits // 8
        stream[first : first + len(piece)] = piece[: len(stream) - first]
    return stream


def _pack_piece(values: Tensor, bits: int) -> Tensor:
    """Eight values of `bits` bits fill one 64-bit word, which holds exactly `bits` bytes."""
    if 8 % bits == 0:
        return _pack_whole(values, bits)
    lanes = torch.arange(8, device=values.device)
    wide = pad(values.to(torch.int64) & ((1 << bits) - 1), (0, -len(values) % 8)).reshape(-1, 8)
    words = (wide << (lanes * bits)).sum(dim=1, keepdim=True)
    stream = ((words >> (lanes[:bits] * 8)) & 255).to(torch.uint8).reshape(-1)
    return stream[: -(-len(values) * bits // 8)]


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """1-D uint8 stream -> `count` unsigned values as uint8: the inverse of `pack_bits`."""
    values = torch.empty(count, dtype=torch.uint8, device=stream.device)
    for start in range(0, count, BLOCK):
        piece = values[start : start + BLOCK]
        first = start * bits // 8
        piece.copy_(_unpack_piece(stream[first : first + BLOCK * bits // 8], bits)[: len(piece)])
    return values


def _pack_whole(values: Tensor, bits: int) -> Tensor:
    """Widths that fill whole bytes stay in bytes."""
    lanes = 8 // bits
    small = pad(values.to(torch.uint8), (0, -len(values) % lanes)).reshape(-1, lanes) & ((1 << bits) - 1)
    stream = small[:, 0]
    for lane in range(1, lanes):
        stream = stream | small[:, lane] << (lane * bits)
    return stream


def _unpack_piece(stream: Tensor, bits: int) -> Tensor:
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        return ((stream.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(-1)
    lanes = torch.arange(8, device=stream.device)
    wide = pad(stream.to(torch.int64), (0, -len(stream) % bits)).reshape(-1, bits)
    words = (wide << (lanes[:bits] * 8)).sum(dim=1, keepdim=True)
    return ((words >> (lanes * bits)) & ((1 << bits) - 1)).to(torch.uint8).reshape(-1)


def own_format(fmt: Format) -> IntegerFormat:
    """The format as this codec's own. Raises ValueError for another family's."""
    if fmt.family != "integer":
        raise ValueError(f"Format must be of the integer family. Got {fmt.name}. Use its own codec.")
    return cast(IntegerFormat, fmt)
