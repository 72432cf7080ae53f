"""The clipping range with the least squared error (Banner et al. 2019, arXiv:1810.05723, section 3).

Instead of assuming a distribution, the error of each tensor, channel or group is computed for a scan of
ranges, from coarse to fine; then the scale is fitted to the chosen integers by least squares, as for
binary weights in Rastegari et al. 2016 (arXiv:1603.05279), a few times in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from quant.formats import codec_of
from quant.inputs import LayerInputs
from quant.integer import IntegerFormat
from quant.packing import Encoded, encode, group, stored_scale
from quant.quantizers.rtn import span

BLOCK = 1 << 16
"""Weights scanned at once: small enough to stay in a core's cache."""
SHORT = 512
"""Groups shorter than this are scanned side by side, so that neighboring weights share no scale."""
FEW = 32
"""Groups with fewer weights have jagged errors: more steps, and ranges beyond the full one, pay."""
SMALLEST_FACTOR = 0.05
LARGEST_FACTOR = 1.3
FINE = tuple(1 + step / 64 for step in range(-5, 6) if step)
SIDES = tuple(1 + step / 12 for step in range(-5, 4) if step)
FITS = 3
MARGIN = 1e-5
"""A range replaces round-to-nearest's only where it is better by more than the sums' rounding error."""


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats; never worse than `rtn` in squared error.

    Temporary memory is that of a block of rows. Candidates of a scan are judged side by side, block by block,
    so the weights are read once for all of them: once per channel or group, a few times per tensor.
    """
    if fmt.family != "integer":
        return cast(Encoded, codec_of(fmt).closest(weight_matrix, fmt))
    return rounded(weight_matrix, fmt, (search(block, fmt) for block in blocks(weight_matrix, fmt)))


def rounded(matrix: Tensor, fmt: IntegerFormat, found: Iterable[tuple[Tensor, Tensor | None]]) -> Encoded:
    """The matrix on the grids of stored scales and zero points that were found block by block."""
    grids = list(found)
    points = None if fmt.symmetric else torch.cat([point for _, point in grids if point is not None])
    return encode(matrix, fmt, torch.cat([scale for scale, _ in grids]), points)


def blocks(matrix: Tensor, fmt: IntegerFormat) -> Iterator[Tensor]:
    """(groups, size) weights, some rows of the matrix at a time; per tensor one (1, all) block."""
    if fmt.granularity == "tensor":
        yield matrix.float().reshape(1, -1)
        return
    for rows in torch.split(matrix, max(1, BLOCK // matrix.shape[1])):
        grouped = group(rows.float(), fmt)
        yield grouped.reshape(-1, grouped.shape[-1])


def search(groups: Tensor, fmt: IntegerFormat) -> tuple[Tensor, Tensor | None]:
    """(count, size) -> stored scales and zero points, both (count,)."""
    scan = Scan.of(groups, fmt)
    [full] = scan.measure([(scan.low, scan.high)])
    best = full
    smallest = scan.smallest_factor(full)
    factors = _coarse(groups.shape[1], smallest)
    for found in scan.measure([(scan.low * factor, scan.high * factor) for factor in factors]):
        best = best.better(found)
    for found in scan.measure(list(_neighbors(best, fmt))):
        best = best.better(found)
    for _ in range(FITS):
        best = best.better(scan.fit(best))
    best = full.better(best, margin=MARGIN)
    return best.scale.reshape(-1), None if best.point is None else best.point.reshape(-1)


def _coarse(size: int, smallest: float) -> list[float]:
    """Factors of the full range at even ratios, down to the smallest one that can win."""
    steps, largest = (128, LARGEST_FACTOR) if size < FEW else (40, 1.0)
    factors = (largest * (SMALLEST_FACTOR / largest) ** (step / steps) for step in range(steps + 1))
    return [factor for factor in factors if factor >= smallest and factor != 1]


def _neighbors(best: Candidate, fmt: IntegerFormat) -> Iterator[tuple[Tensor, Tensor]]:
    """Ranges close to the best one; the two ends of an asymmetric range move on their own."""
    for factor in FINE:
        yield best.low * factor, best.high * factor
    if not fmt.symmetric:
        for factor in SIDES:
            yield best.low * factor, best.high
            yield best.low, best.high * factor


@dataclass(frozen=True)
class Candidate:
    """One range per group with its stored scale, zero point and error; all shaped to broadcast."""

    low: Tensor
    high: Tensor
    scale: Tensor
    point: Tensor | None
    error: Tensor

    def better(self, other: Candidate, margin: float = 0.0) -> Candidate:
        """Group by group, the other where its error is smaller, else this one."""
        wins = other.error < self.error * (1 - margin)
        point = None
        if self.point is not None and other.point is not None:
            point = torch.where(wins, other.point, self.point)
        return Candidate(
            torch.where(wins, other.low, self.low),
            torch.where(wins, other.high, self.high),
            torch.where(wins, other.scale, self.scale),
            point,
            torch.where(wins, other.error, self.error),
        )


@dataclass(frozen=True)
class Scan:
    """A block of groups, each divided by a power of two so that squares neither overflow nor vanish.

    `weights` is (count, size), or (size, count) for short groups; `axis` is the one along a group. `unit`
    holds the powers of two; `low` and `high` are each group's range, 0 included, before division. Groups that
    are longer than a block are divided piece by piece in `divided`, None where `weights` are divided already.
    """

    fmt: IntegerFormat
    axis: int
    weights: Tensor
    unit: Tensor
    low: Tensor
    high: Tensor
    buffer: Tensor = field(repr=False)
    divided: Tensor | None = field(repr=False)

    @classmethod
    def of(cls, groups: Tensor, fmt: IntegerFormat) -> Scan:
        """Lay out (count, size) weights for scanning."""
        axis = 0 if groups.shape[1] < SHORT else 1
        weights = groups.t().contiguous() if axis == 0 else groups
        low = weights.amin(dim=axis, keepdim=True).clamp(max=0)
        high = weights.amax(dim=axis, keepdim=True).clamp(min=0)
        exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp(-125, 126)
        unit = torch.ldexp(torch.ones_like(low), exponent)
        if axis == 1 and weights.shape[1] > BLOCK:
            buffer, divided = (torch.empty_like(weights[:, :BLOCK]) for _ in range(2))
            return cls(fmt, axis, weights, unit, low, high, buffer, divided)
        return cls(fmt, axis, weights / unit, unit, low, high, torch.empty_like(weights), None)

    def measure(self, ranges: Sequence[tuple[Tensor, Tensor]]) -> list[Candidate]:
        """The errors of ranges, with their scales and zero points as they would be stored."""
        grids = [span(low, high, self.fmt) for low, high in ranges]
        errors = self._errors(grids)
        return [
            Candidate(low, high, scale, point, error)
            for (low, high), (scale, point), error in zip(ranges, grids, errors, strict=True)
        ]

    def smallest_factor(self, full: Candidate) -> float:
        """The factor below which no shrunken range of the block can beat the full one.

        The largest |w| of a group alone misses by |w| - (top of the grid), and the top of the grid is at
        most factor * |w| * (1 + 1 / highest).
        """
        largest = torch.maximum(-self.low, self.high) / self.unit
        kept = (largest - full.error.sqrt()) / largest.clamp(min=torch.finfo(largest.dtype).tiny)
        return 0.99 * kept.clamp(min=0).amin().item() / (1 + 1 / self.fmt.highest)

    def fit(self, best: Candidate) -> Candidate:
        """The least-squares scale for the integers that a candidate rounds to, its zero point kept."""
        dot = torch.zeros_like(self.unit)
        square = torch.zeros_like(self.unit)
        scale = best.scale.float() / self.unit
        for part in self.parts():
            levels = self.levels(part, scale, best.point)
            square += levels.square().sum(dim=self.axis, keepdim=True)
            dot += levels.mul_(part).sum(dim=self.axis, keepdim=True)
        fitted = torch.where(square > 0, dot / square.clamp(min=1) * self.unit, best.scale.float())
        stored = stored_scale(fitted, self.fmt.scale_type)
        [error] = self._errors([(stored, best.point)])
        return Candidate(best.low, best.high, stored, best.point, error)

    def _errors(self, grids: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """Squared errors; each piece of the weights is taken once for all grids."""
        scales = [stored.float() / self.unit for stored, _ in grids]
        totals = [torch.zeros_like(self.unit) for _ in grids]
        for part in self.parts():
            for total, scale, (_, point) in zip(totals, scales, grids, strict=True):
                miss = self.levels(part, scale, point).mul_(scale).sub_(part)
                total.add_(torch.linalg.vector_norm(miss, dim=self.axis, keepdim=True).square())
        return totals

    def parts(self) -> Iterator[Tensor]:
        """Pieces of the divided weights that stay in a core's cache, each valid until the next."""
        if self.divided is None:
            yield self.weights
            return
        for part in torch.split(self.weights, BLOCK, dim=1):
            yield torch.div(part, self.unit, out=self.divided.narrow(1, 0, part.shape[1]))

    def levels(self, part: Tensor, scale: Tensor, point: Tensor | None) -> Tensor:
        """Integers minus zero point, in the shared buffer."""
        levels = torch.div(part, scale, out=self.buffer.narrow(1, 0, part.shape[1])).round_()
        if point is None:
            return levels.clamp_(self.fmt.lowest, self.fmt.highest)
        return levels.clamp_(self.fmt.lowest - point, self.fmt.highest - point)
