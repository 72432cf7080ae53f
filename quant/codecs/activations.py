"""Rounding a layer's input as an activation format says, and choosing the range of a static scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.activations import TOKENWISE, ActivationFormat
from quant.codecs.elements import snap
from quant.elements import ELEMENTS

E4M3 = ELEMENTS["e4m3"]
TINY = 2.0**-126
BINS = 1 << 15
INFINITE = 0x7F80
"""Bins are the 15 bits after a float32's sign: exponent and 7 bits of mantissa. Bins from here on are not
finite.
"""
POINTS = 8
"""Values that stand for one bin: evenly spread over it, so that no step of a grid meets only its middle."""
CLIPS = tuple(2.0 ** (-step / 8) for step in range(57))
"""Ranges tried, relative to the largest magnitude: down to 1/128 of it."""
SPATIAL = {"conv1d": 1, "conv2d": 2}


def round_input(values: Tensor, fmt: ActivationFormat, op: str, limit: float | None = None) -> Tensor:
    """A layer's input as its kernel sees it: same shape, type and device.

    Linear layers take their scales for each token (the last side are its features), convolutions for each
    sample. `limit` is the range of a static format: the largest magnitude that it represents.
    """
    if fmt.static and limit is None:
        raise ValueError(
            f"Activation {fmt.name} must be given a range. Got none. Choose it with `best_range`."
        )
    rows = _rows(values, op)
    if fmt.block:
        rounded = _blocks(rows, fmt, limit)
    else:
        top = _highest(fmt)
        largest = rows.abs().amax(dim=1, keepdim=True) if limit is None else rows.new_tensor(limit)
        rounded = _scaled(rows, (largest / top).clamp(min=TINY), fmt)
    return rounded.reshape(values.shape).to(values.dtype)


def _rows(values: Tensor, op: str) -> Tensor:
    """float32 (tokens or samples, values)."""
    if op in TOKENWISE:
        return values.reshape(-1, values.shape[-1]).float()
    batched = values.ndim > SPATIAL[op] + 1
    return values.reshape(values.shape[0] if batched else 1, -1).float()


def _highest(fmt: ActivationFormat) -> float:
    return float((1 << (fmt.bits - 1)) - 1) if fmt.element is None else fmt.element.highest


def _scaled(numbers: Tensor, scale: Tensor, fmt: ActivationFormat) -> Tensor:
    if fmt.element is not None:
        return snap(numbers / scale, fmt.element).mul_(scale)
    top = _highest(fmt)
    return (numbers / scale).round_().clamp_(-top - 1, top).mul_(scale)


def _blocks(rows: Tensor, fmt: ActivationFormat, limit: float | None) -> Tensor:
    assert fmt.element is not None
    blocks = rows.reshape(len(rows), -1, fmt.block)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    if fmt.kind == "mxfp8":
        exponent = torch.frexp(largest).exponent - 1 - fmt.element.highest_exponent
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-127, 127))
    else:
        outer = largest.amax(dim=1, keepdim=True) if limit is None else rows.new_tensor(limit)
        outer = (outer / (E4M3.highest * fmt.element.highest)).clamp(min=TINY)
        scale = snap(largest / fmt.element.highest / outer, E4M3) * outer
    rounded = snap(blocks / scale, fmt.element) * scale
    return torch.where((scale > 0) | largest.isnan(), rounded, 0.0).reshape(rows.shape)


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """How often each magnitude occurs among a layer's inputs: counts of `BINS` bins, and the largest.

    Counts are whole numbers, so they do not depend on the order in which data come.
    """

    counts: Tensor
    largest: float

    @classmethod
    def none(cls) -> Magnitudes:
        """Before any data."""
        return cls(torch.zeros(BINS, dtype=torch.int64), 0.0)

    def plus(self, values: Tensor) -> Magnitudes:
        """With more data, of any shape."""
        if values.numel() == 0:
            return self
        sizes = values.detach().float().abs().reshape(-1).contiguous()
        bins = sizes.view(torch.int32) >> 16
        counts = self.counts + torch.bincount(bins, minlength=BINS).cpu()
        return Magnitudes(counts, max(self.largest, float(sizes.amax())))

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return not bool(self.counts[INFINITE:].any())


def best_range(magnitudes: Magnitudes, fmt: ActivationFormat, clips: Sequence[float] = CLIPS) -> float:
    """The range of a static scale: the largest magnitude, or less of it where that rounds with less error.

    Squared error over all inputs that were counted, each bin spread evenly. Formats in blocks keep the
    largest magnitude: their block scales see to small values. 1.0 where no input was anything but zero.

    >>> seen = Magnitudes.none().plus(torch.cat([torch.linspace(0, 1, 1000), torch.tensor([3.0])]))
    >>> best_range(seen, ActivationFormat("int8", static=True))
    3.0
    >>> round(best_range(seen, ActivationFormat("int4", static=True)), 2)
    1.16
    """
    if magnitudes.largest == 0:
        return 1.0
    if fmt.block:
        return magnitudes.largest
    values, weights = _points(magnitudes)
    errors = []
    for clip in clips:
        scale = torch.tensor(clip * magnitudes.largest / _highest(fmt), dtype=torch.float32).clamp(min=TINY)
        rounded = _scaled(values, scale, fmt)
        errors.append(float(((rounded - values).double().square() * weights).sum()))
    return float(torch.tensor(clips[errors.index(min(errors))] * magnitudes.largest, dtype=torch.float32))


def _points(magnitudes: Magnitudes) -> tuple[Tensor, Tensor]:
    """float32 values and float64 weights (bins that occur * POINTS,)."""
    found = magnitudes.counts[:INFINITE].nonzero().reshape(-1)
    lower = (found.to(torch.int32) << 16).view(torch.float32)
    upper = ((found.to(torch.int32) + 1) << 16).view(torch.float32).clamp(max=magnitudes.largest)
    inside = (torch.arange(POINTS) + 0.5) / POINTS
    values = lower[:, None] + (upper - lower).clamp(min=0)[:, None] * inside
    weights = magnitudes.counts[found].double()[:, None].expand_as(values) / POINTS
    return values.reshape(-1).contiguous(), weights.reshape(-1)
