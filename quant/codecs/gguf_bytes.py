"""Where each bit of a GGUF block lies. `pack_blocks` and `unpack_blocks` are an inverse pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.gguf_blocks import GgufFormat

Scales = tuple[Tensor, ...]
"""d | d, m | integers, d | integers of scales, integers of minimums, d, m; all (blocks, ...)."""


@dataclass(frozen=True)
class Bits:
    """`width` bits of every code, from bit `low` up, in `runs` runs of bytes.

    Codes lie as (runs, lanes, bytes); the lanes of a byte lie beside each other from its lowest bit up.
    """

    low: int
    width: int
    runs: int
    lanes: int
    length: int

    @property
    def bytes(self) -> int:
        """Bytes of the field in one block."""
        return self.runs * self.length


NIBBLES = Bits(0, 4, 1, 2, 16)
FIFTH = Bits(4, 1, 4, 8, 1)
PAIRS = Bits(0, 2, 2, 4, 32)
LAYOUTS: dict[str, tuple[Bits | str, ...]] = {
    "q4_0": ("d", NIBBLES),
    "q4_1": ("d", "m", NIBBLES),
    "q5_0": ("d", FIFTH, NIBBLES),
    "q5_1": ("d", "m", FIFTH, NIBBLES),
    "q8_0": ("d", Bits(0, 8, 1, 1, 32)),
    "q2_k": ("scales", PAIRS, "d", "m"),
    "q3_k": (Bits(2, 1, 1, 8, 32), PAIRS, "scales", "d"),
    "q4_k": ("d", "m", "scales", Bits(0, 4, 4, 2, 32)),
    "q5_k": ("d", "m", "scales", Bits(4, 1, 1, 8, 32), Bits(0, 4, 4, 2, 32)),
    "q6_k": (Bits(0, 4, 2, 2, 64), Bits(4, 2, 2, 4, 32), "scales", "d"),
}
SCALE_BYTES = {"q2_k": 16, "q3_k": 12, "q4_k": 12, "q5_k": 12, "q6_k": 16}


def pack_blocks(codes: Tensor, scales: Scales, fmt: GgufFormat) -> Tensor:
    """(blocks, size) codes and their scales -> (blocks, block bytes) uint8."""
    halves = {"d": scales[-2 if fmt.minimum else -1], "m": scales[-1]}
    stored = codes ^ 128 if fmt.bits == 8 else codes
    parts = []
    for field in LAYOUTS[fmt.name]:
        if isinstance(field, Bits):
            parts.append(_gather(stored, field))
        elif field == "scales":
            parts.append(_pack_scales(scales, fmt))
        else:
            parts.append(halves[field].reshape(-1, 1).view(torch.uint8))
    return torch.cat(parts, dim=1)


def unpack_blocks(blocks: Tensor, fmt: GgufFormat) -> tuple[Tensor, Scales]:
    """(blocks, block bytes) uint8 -> (blocks, size) codes and their scales."""
    codes = torch.zeros((len(blocks), fmt.size), dtype=torch.uint8, device=blocks.device)
    halves: dict[str, Tensor] = {}
    integers: Scales = ()
    start = 0
    for field in LAYOUTS[fmt.name]:
        length = field.bytes if isinstance(field, Bits) else SCALE_BYTES[fmt.name] if field == "scales" else 2
        part = blocks[:, start : start + length].contiguous()
        start += length
        if isinstance(field, Bits):
            codes |= _spread(part, field)
        elif field == "scales":
            integers = _unpack_scales(part, fmt)
        else:
            halves[field] = part.view(torch.float16).reshape(-1)
    codes = codes ^ 128 if fmt.bits == 8 else codes
    return codes, (*integers, *halves.values())


def _gather(codes: Tensor, field: Bits) -> Tensor:
    lanes = codes.reshape(-1, field.runs, field.lanes, field.length) >> field.low
    lanes = lanes & ((1 << field.width) - 1)
    found = lanes[:, :, 0]
    for lane in range(1, field.lanes):
        found = found | lanes[:, :, lane] << (lane * field.width)
    return found.reshape(-1, field.bytes)


def _spread(part: Tensor, field: Bits) -> Tensor:
    shaped = part.reshape(-1, field.runs, 1, field.length)
    shifts = torch.arange(field.lanes, dtype=torch.uint8, device=part.device) * field.width
    lanes = (shaped >> shifts.reshape(1, 1, -1, 1)) & ((1 << field.width) - 1)
    return (lanes << field.low).reshape(len(part), -1)


def _pack_scales(scales: Scales, fmt: GgufFormat) -> Tensor:
    if fmt.name == "q2_k":
        return scales[0] | scales[1] << 4
    if fmt.name == "q6_k":
        return scales[0].view(torch.uint8)
    if fmt.name == "q3_k":
        six = (scales[0].to(torch.int16) + 32).to(torch.uint8)
        return torch.cat((_gather(six, Bits(0, 4, 1, 2, 8)), _gather(six, Bits(4, 2, 1, 4, 4))), dim=1)
    scale, minimum = scales[0], scales[1]
    first = [part[:, :4] | (part[:, 4:] >> 4) << 6 for part in (scale, minimum)]
    last = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return torch.cat((*first, last), dim=1)


def _unpack_scales(part: Tensor, fmt: GgufFormat) -> Scales:
    if fmt.name == "q2_k":
        return part & 15, part >> 4
    if fmt.name == "q6_k":
        return (part.view(torch.int8),)
    if fmt.name == "q3_k":
        six = _spread(part[:, :8], Bits(0, 4, 1, 2, 8)) | _spread(part[:, 8:], Bits(4, 2, 1, 4, 4))
        return ((six.to(torch.int16) - 32).to(torch.int8),)
    first, second, last = part[:, :4], part[:, 4:8], part[:, 8:]
    scale = torch.cat((first & 63, (last & 15) | (first >> 6) << 4), dim=1)
    minimum = torch.cat((second & 63, (last >> 4) | (second >> 6) << 4), dim=1)
    return scale, minimum
