"""Scales of GGUF blocks with a small squared error.

Sub-block by sub-block, ranges around the full one are tried; each gives codes, and the codes give scale and
minimum by least squares. Then the integers that stand for them and the block's float16 numbers are improved
in turn. Weights lie as (columns of a sub-block, sub-blocks), so that neighbors share no scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.codecs.gguf_bytes import Scales
from quant.gguf_blocks import GgufFormat

SHIFTS = tuple(step / 8 for step in range(-8, 9))
"""Codes more or less than there are, over which the range is spread."""
ROUNDS = 2
LARGEST = 65504.0
Integers = Callable[[Tensor, Tensor, GgufFormat], Scales]


def search(blocks: Tensor, fmt: GgufFormat, integers: Integers) -> Iterator[Scales]:
    """(count, size) weights -> one better set of stored scales after the other.

    `integers` turns scales and minimums, (count, sub-blocks), into what K-quants store.
    """
    weights = blocks.reshape(-1, fmt.size // fmt.subs).t().contiguous()
    best = _affine(weights, fmt) if fmt.minimum else _symmetric(weights, fmt)
    if not fmt.sub_size:
        yield _halves(best, fmt)
        return
    shape = (len(blocks), fmt.subs)
    found = integers(best.scale.reshape(shape), best.minimum.reshape(shape), fmt)
    yield found
    for _ in range(ROUNDS):
        found = _moved(weights, found, fmt)
        yield found
        found = _refitted(weights, found, fmt)
        yield found


@dataclass(frozen=True)
class Fit:
    """Scale and minimum (subtracted) per column of `weights`, with what they gain in squared error."""

    scale: Tensor
    minimum: Tensor
    gain: Tensor

    def better(self, other: Fit) -> Fit:
        """Column by column, the other where it gains more."""
        wins = other.gain > self.gain
        pairs = ((self.scale, other.scale), (self.minimum, other.minimum), (self.gain, other.gain))
        return Fit(*(torch.where(wins, new, old) for old, new in pairs))


def _symmetric(weights: Tensor, fmt: GgufFormat) -> Fit:
    """The largest |w| is spread over the lower or the upper half of the codes."""
    index = weights.abs().argmax(dim=0, keepdim=True)
    top = weights.gather(0, index).squeeze(0)
    best = Fit(top / -fmt.offset, torch.zeros_like(top), torch.full_like(top, -torch.inf))
    for shift in SHIFTS:
        for codes in (-fmt.offset + shift, fmt.offset - 1 + shift):
            scale = top / codes
            levels = _levels(weights, scale, torch.zeros_like(scale), fmt)
            square = levels.square().sum(dim=0).clamp(min=1e-9)
            dot = levels.mul_(weights).sum(dim=0)
            best = best.better(Fit(dot / square, best.minimum, dot.square() / square))
    return best


def _affine(weights: Tensor, fmt: GgufFormat) -> Fit:
    """The range from least to largest weight is spread over a few codes more or less."""
    low, high = weights.amin(dim=0), weights.amax(dim=0)
    if fmt.sub_size:
        low = low.clamp(max=0)
    best = Fit((high - low) / fmt.highest, -low, torch.full_like(low, -torch.inf))
    total = weights.sum(dim=0)
    for shift in SHIFTS:
        scale = (high - low) / (fmt.highest + shift)
        levels = _levels(weights, scale, -low, fmt)
        count, square = levels.sum(dim=0), levels.square().sum(dim=0)
        dot = levels.mul_(weights).sum(dim=0)
        best = best.better(_solved(len(weights), count, square, dot, total, positive=bool(fmt.sub_size)))
    return best


def _solved(size: int, count: Tensor, square: Tensor, dot: Tensor, total: Tensor, *, positive: bool) -> Fit:
    """Least squares of w = scale * code - minimum from sums over the codes; minimum >= 0 if `positive`."""
    spread = square - count.square() / size
    scale = torch.where(spread > 1e-6, (dot - count * total / size) / spread.clamp(min=1e-6), 0.0)
    minimum = (scale * count - total) / size
    alone = torch.where(square > 0, dot / square.clamp(min=1e-6), 0.0)
    if positive:
        scale = torch.where(minimum < 0, alone, scale)
        minimum = minimum.clamp(min=0)
    gain = scale * dot - minimum * total
    return Fit(scale, minimum, torch.where(scale > 0, gain, -torch.inf))


def _levels(weights: Tensor, scale: Tensor, minimum: Tensor, fmt: GgufFormat) -> Tensor:
    """Codes minus offset."""
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return ((weights + minimum) * inverse).round_().clamp_(-fmt.offset, fmt.highest - fmt.offset)


def _halves(best: Fit, fmt: GgufFormat) -> Scales:
    found = (best.scale, -best.minimum) if fmt.minimum else (best.scale,)
    return tuple(part.nan_to_num().clamp(-LARGEST, LARGEST).half() for part in found)


def _split(scales: Scales) -> tuple[list[Tensor], list[Tensor]]:
    """Stored scales -> integers (count, subs) and block numbers (count, 1), as floats."""
    half = len(scales) // 2
    return [part.float() for part in scales[:half]], [part.float().unsqueeze(-1) for part in scales[half:]]


def _stored(integers: list[Tensor], numbers: list[Tensor], fmt: GgufFormat) -> Scales:
    kind = torch.uint8 if fmt.minimum else torch.int8
    low = 0 if fmt.minimum else -(1 << (fmt.scale_bits - 1))
    high = low + (1 << fmt.scale_bits) - 1
    kept = [part.nan_to_num().clamp(low, high).to(kind) for part in integers]
    halves = [part.nan_to_num().clamp(-LARGEST, LARGEST).half().reshape(-1) for part in numbers]
    return (*kept, *halves)


def _moved(weights: Tensor, scales: Scales, fmt: GgufFormat) -> Scales:
    """Each sub-block's integers, one step up or down where that leaves less error."""
    integers, numbers = _split(scales)
    low = 0 if fmt.minimum else -(1 << (fmt.scale_bits - 1))
    high = low + (1 << fmt.scale_bits) - 1
    best = [part.clone() for part in integers]
    least = _loss(weights, best, numbers, fmt)
    around = [(0,), (-1,), (1,)] if len(integers) == 1 else [(a, b) for a in (0, -1, 1) for b in (0, -1, 1)]
    for steps in around[1:]:
        tried = [(part + step).clamp(low, high) for part, step in zip(integers, steps, strict=True)]
        loss = _loss(weights, tried, numbers, fmt)
        wins = loss < least
        best = [torch.where(wins, new, old) for new, old in zip(tried, best, strict=True)]
        least = torch.where(wins, loss, least)
    return _stored(best, numbers, fmt)


def _loss(weights: Tensor, integers: list[Tensor], numbers: list[Tensor], fmt: GgufFormat) -> Tensor:
    """Squared error of each sub-block, (count, subs)."""
    scale, minimum = _flat(integers, numbers)
    miss = _levels(weights, scale, minimum, fmt).mul_(scale).sub_(minimum).sub_(weights)
    return miss.square_().sum(dim=0).reshape(integers[0].shape)


def _flat(integers: list[Tensor], numbers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each sub-block, (count * subs,)."""
    parts = [(part * number).reshape(-1) for part, number in zip(integers, numbers, strict=True)]
    return parts[0], parts[1] if len(parts) > 1 else torch.zeros_like(parts[0])


def _refitted(weights: Tensor, scales: Scales, fmt: GgufFormat) -> Scales:
    """The block's numbers by least squares, its codes and integers kept."""
    integers, numbers = _split(scales)
    levels = _levels(weights, *_flat(integers, numbers), fmt)
    shape = integers[0].shape
    square = (levels.square().sum(dim=0).reshape(shape) * integers[0].square()).sum(dim=1)
    count = levels.sum(dim=0).reshape(shape) * integers[0]
    dot = (levels.mul_(weights).sum(dim=0).reshape(shape) * integers[0]).sum(dim=1)
    if not fmt.minimum:
        unit = torch.where(square > 0, dot / square.clamp(min=1e-9), numbers[0].reshape(-1))
        return _stored(integers, [unit], fmt)
    # w = d * A - m * B with A = code * integer, B = integer of the minimum
    cross = (count * integers[1]).sum(dim=1)
    other = integers[1].square().sum(dim=1) * len(weights)
    total = (weights.sum(dim=0).reshape(shape) * integers[1]).sum(dim=1)
    determinant = square * other - cross.square()
    solvable = determinant > 1e-6 * square * other
    safe = torch.where(solvable, determinant, 1.0)
    scale = torch.where(solvable, (dot * other - total * cross) / safe, numbers[0].reshape(-1))
    minimum = torch.where(solvable, (dot * cross - total * square) / safe, numbers[1].reshape(-1))
    return _stored(integers, [scale.clamp(min=0), minimum.clamp(min=0)], fmt)
