"""GGUF matrices: nearest and closest scales, codes, and their bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant.codecs.gguf_bytes import Scales, pack_blocks, unpack_blocks
from quant.codecs.gguf_search import search
from quant.codecs.stored import Coded, Packed, grouped, own, row_blocks, ungrouped
from quant.gguf_blocks import GgufFormat
from quant.storage import Format, Matrix

LARGEST = 65504.0
Choose = Callable[[Tensor, GgufFormat], tuple[Tensor, Scales]]


def own_format(fmt: Format) -> GgufFormat:
    """The format as this codec's own. Raises ValueError for another family's."""
    return own(fmt, "gguf", GgufFormat)


def nearest(matrix: Tensor, fmt: GgufFormat) -> Coded[GgufFormat]:
    """Scales that cover each block's (and sub-block's) full range.

    For blocks of 32 these are the bytes that llama.cpp's reference writes; K-quants are written without
    its search.
    """
    return _by_blocks(matrix, fmt, _nearest)


def closest(matrix: Tensor, fmt: GgufFormat) -> Coded[GgufFormat]:
    """The scales with the least squared error that the search finds; no block is worse than `nearest`."""
    return _by_blocks(matrix, fmt, _closest)


def encode(matrix: Tensor, fmt: GgufFormat, scales: Scales) -> Coded[GgufFormat]:
    """Round a float matrix to the values that stored scales span."""
    flat = tuple(part.flatten(0, 1) for part in scales)
    blocks = grouped(matrix, fmt)
    codes = _codes(blocks.flatten(0, 1), *_steps(flat, fmt), fmt)
    rows, columns = matrix.shape
    return Coded(codes.reshape(blocks.shape), scales, fmt, (rows, columns))


def decode(coded: Coded[GgufFormat]) -> Tensor:
    """The float32 matrix that the stored codes stand for, to the bit as the gguf package reads it."""
    rows, columns = coded.matrix
    result = torch.empty(coded.matrix, device=coded.values.device)
    for part in row_blocks(rows, columns):
        codes = coded.values[part]
        scales = tuple(scale[part].flatten(0, 1) for scale in coded.scales)
        numbers = _numbers(codes.flatten(0, 1), scales, coded.fmt)
        result[part] = ungrouped(numbers, (codes.shape[0], columns))
    return result


def pack(coded: Coded[GgufFormat]) -> Packed[GgufFormat]:
    """Codes and scales -> the bytes of a GGUF tensor, block after block."""
    rows, blocks, _ = coded.values.shape
    size = (rows, blocks * coded.fmt.block_bytes)
    stream = torch.empty(size, dtype=torch.uint8, device=coded.values.device)
    for part in row_blocks(rows, coded.matrix[1]):
        scales = tuple(scale[part].flatten(0, 1) for scale in coded.scales)
        packed = pack_blocks(coded.values[part].flatten(0, 1), scales, coded.fmt)
        stream[part] = packed.reshape(-1, size[1])
    return Packed(stream.reshape(-1), (), coded.fmt, coded.matrix)


def unpack(packed: Packed[GgufFormat]) -> Coded[GgufFormat]:
    """The inverse of `pack`."""
    rows, _, _ = packed.fmt.grouped_shape(packed.matrix)
    stream = packed.values.reshape(rows, -1)
    found = [
        unpack_blocks(stream[part].reshape(-1, packed.fmt.block_bytes), packed.fmt)
        for part in row_blocks(rows, packed.matrix[1])
    ]
    return _joined(found, packed.fmt, packed.matrix)


def _by_blocks(matrix: Tensor, fmt: GgufFormat, choose: Choose) -> Coded[GgufFormat]:
    rows, columns = matrix.shape
    parts = row_blocks(rows, columns)
    found = [choose(grouped(matrix[part], fmt).flatten(0, 1), fmt) for part in parts]
    return _joined(found, fmt, (rows, columns))


def _joined(found: list[tuple[Tensor, Scales]], fmt: GgufFormat, matrix: Matrix) -> Coded[GgufFormat]:
    shape = fmt.grouped_shape(matrix)
    values = torch.cat([codes for codes, _ in found]).reshape(shape)
    joined = [torch.cat(parts) for parts in zip(*(scales for _, scales in found), strict=True)]
    scales = tuple(part.reshape(*shape[:2], *part.shape[1:]) for part in joined)
    return Coded(values, scales, fmt, matrix)


def _nearest(blocks: Tensor, fmt: GgufFormat) -> tuple[Tensor, Scales]:
    """(count, size) weights -> codes and scales."""
    subs = blocks.reshape(-1, fmt.subs, fmt.size // fmt.subs)
    if fmt.sub_size:
        scales = _integer_scales(*_covering(subs, fmt), fmt)
        return _codes(blocks, *_steps(scales, fmt), fmt), scales
    scale, minimum = (part.reshape(-1) for part in _covering(subs, fmt))
    inverse = torch.where(scale != 0, 1 / scale, 0.0).nan_to_num(posinf=0.0, neginf=0.0).unsqueeze(-1)
    shifted = (blocks + minimum.unsqueeze(-1)) * inverse
    if fmt.bits == 8:
        codes = shifted.sign() * (shifted.abs() + 0.5).floor() + fmt.offset
    else:
        codes = (shifted + (fmt.offset + 0.5)).trunc()
    halves = (scale.half(), (-minimum).half()) if fmt.minimum else (scale.half(),)
    return codes.clamp_(0, fmt.highest).to(torch.uint8), halves


def _covering(subs: Tensor, fmt: GgufFormat) -> tuple[Tensor, Tensor]:
    """Scale and minimum (subtracted) of each sub-block that cover its range, both (count, subs)."""
    low, high = subs.amin(dim=-1), subs.amax(dim=-1)
    limit = LARGEST * 0.999
    if not fmt.minimum:
        if fmt.bits == 8:
            return (torch.maximum(-low, high) / 127).clamp(max=limit), torch.zeros_like(low)
        index = subs.abs().argmax(dim=-1, keepdim=True)
        return (subs.gather(-1, index).squeeze(-1) / -fmt.offset).clamp(-limit, limit), torch.zeros_like(low)
    if fmt.sub_size:
        low = low.clamp(max=0)
    low = low.clamp(-limit, limit)
    return ((high - low) / fmt.highest).clamp(0, limit), -low


def _integer_scales(scale: Tensor, minimum: Tensor, fmt: GgufFormat) -> Scales:
    """Scales and minimums of sub-blocks -> integers times a float16 number per block."""
    if fmt.minimum:
        top = (1 << fmt.scale_bits) - 1
        pairs = [_integers(part, part.amax(dim=-1) / top, 0, top) for part in (scale, minimum)]
        return tuple(pair[0].to(torch.uint8) for pair in pairs) + tuple(pair[1] for pair in pairs)
    half = 1 << (fmt.scale_bits - 1)
    index = scale.abs().argmax(dim=-1, keepdim=True)
    unit = scale.gather(-1, index).squeeze(-1) / -half
    integers, stored = _integers(scale, unit, -half, half - 1)
    return integers.to(torch.int8), stored


def _integers(numbers: Tensor, unit: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    stored = unit.clamp(-LARGEST, LARGEST).half()
    step = stored.float().unsqueeze(-1)
    return torch.where(step != 0, numbers / step, 0.0).round_().clamp_(low, high), stored


def _steps(scales: Scales, fmt: GgufFormat) -> tuple[Tensor, Tensor | None]:
    """Stored scales -> scale and minimum of each sub-block, (count, subs)."""
    if not fmt.sub_size:
        minimum = -scales[1].float().unsqueeze(-1) if fmt.minimum else None
        return scales[0].float().unsqueeze(-1), minimum
    if not fmt.minimum:
        return scales[1].float().unsqueeze(-1) * scales[0].float(), None
    return (
        scales[2].float().unsqueeze(-1) * scales[0].float(),
        scales[3].float().unsqueeze(-1) * scales[1].float(),
    )


def _codes(blocks: Tensor, scale: Tensor, minimum: Tensor | None, fmt: GgufFormat) -> Tensor:
    subs = blocks.reshape(-1, fmt.subs, fmt.size // fmt.subs)
    shifted = subs if minimum is None else subs + minimum.unsqueeze(-1)
    step = scale.unsqueeze(-1)
    codes = torch.where(step != 0, shifted / step, 0.0).round_().add_(fmt.offset)
    return codes.clamp_(0, fmt.highest).to(torch.uint8).reshape(blocks.shape)


def _numbers(codes: Tensor, scales: Scales, fmt: GgufFormat) -> Tensor:
    scale, minimum = _steps(scales, fmt)
    numbers = codes.reshape(-1, fmt.subs, fmt.size // fmt.subs).float()
    if fmt.offset:
        numbers.sub_(fmt.offset)
    numbers.mul_(scale.unsqueeze(-1))
    if minimum is not None:
        numbers.sub_(minimum.unsqueeze(-1))
    return numbers.reshape(codes.shape)


def _closest(blocks: Tensor, fmt: GgufFormat) -> tuple[Tensor, Scales]:
    """The better of round-to-nearest and of what the search finds, block by block."""
    codes, scales = _nearest(blocks, fmt)
    error = _error(blocks, codes, scales, fmt)
    for found in search(blocks, fmt, _integer_scales):
        tried = _codes(blocks, *_steps(found, fmt), fmt)
        loss = _error(blocks, tried, found, fmt)
        wins = loss < error
        codes = torch.where(wins.unsqueeze(-1), tried, codes)
        scales = tuple(
            torch.where(wins.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
            for new, old in zip(found, scales, strict=True)
        )
        error = torch.where(wins, loss, error)
    return codes, scales


def _error(blocks: Tensor, codes: Tensor, scales: Scales, fmt: GgufFormat) -> Tensor:
    return _numbers(codes, scales, fmt).sub_(blocks).square_().sum(dim=-1)
