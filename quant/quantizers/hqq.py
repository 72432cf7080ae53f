"""Half-quadratic quantization (HQQ, Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/).

Scales and zero points with the least sum of |w - w_q|^p, p < 1: many small errors count for more than a few
large ones. Half-quadratic splitting: in turn, each error is divided into an outlier, by the generalized soft
threshold of the p-norm, and a rest; then the grid is fitted to the weights less their outliers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.inputs import LayerInputs
from quant.integer import IntegerFormat
from quant.packing import Encoded, stored_scale
from quant.quantizers import mse_clip
from quant.quantizers.mse_clip import MARGIN, Candidate, Scan

POWER = 0.7
"""The p of the objective, as in the paper."""
STEPS = 20
FIRST_PENALTY, GROWTH = 1.4, 1.15
"""Penalty on errors that are not outliers, in grid steps; it grows from turn to turn."""


def quantize(weight_matrix: Tensor, fmt: IntegerFormat, inputs: LayerInputs | None = None) -> Encoded:
    """Quantize (output channels, columns) of finite floats; never worse than `rtn` in sum |w - w_q|^0.7.

    Scales and zero points move together for asymmetric formats, the scale alone for symmetric ones. The
    fit is continuous; every step is judged with the scale and the integer zero point that would be stored.
    """
    found = (_search(block, fmt) for block in mse_clip.blocks(weight_matrix, fmt))
    return mse_clip.rounded(weight_matrix, fmt, found)


def _search(groups: Tensor, fmt: IntegerFormat) -> tuple[Tensor, Tensor | None]:
    """(count, size) -> stored scales and zero points, both (count,).

    A search near two good ranges, on purpose: over all ranges the sum is least where far too much is clipped.
    """
    least_squares = mse_clip.search(groups, fmt)
    scan = Scan.of(groups, fmt)
    full = _judged(scan, scan.measure([(scan.low, scan.high)])[0])
    clipped = _judged(scan, _shaped(full, *least_squares))
    best = full.better(clipped)
    for start in (full, clipped):
        best = _improved(scan, start, best)
    best = full.better(best, margin=MARGIN)
    return best.scale.reshape(-1), None if best.point is None else best.point.reshape(-1)


def _shaped(like: Candidate, scale: Tensor, point: Tensor | None) -> Candidate:
    shape = like.scale.shape
    return replace(like, scale=scale.reshape(shape), point=None if point is None else point.reshape(shape))


def _judged(scan: Scan, candidate: Candidate) -> Candidate:
    """With the error that is minimized here, of the values as they would be stored."""
    error, scale = torch.zeros_like(scan.unit), candidate.scale.float() / scan.unit
    for part in scan.parts():
        miss = scan.levels(part, scale, candidate.point).mul_(scale).sub_(part)
        error += miss.abs_().pow_(POWER).sum(dim=scan.axis, keepdim=True)
    return replace(candidate, error=error)


def _improved(scan: Scan, start: Candidate, best: Candidate) -> Candidate:
    """The best of `best` and every step from `start`."""
    scale, point, penalty = start.scale.float() / scan.unit, start.point, FIRST_PENALTY
    for _ in range(STEPS):
        scale, point = _step(scan, scale, point, penalty)
        stored = stored_scale(scale * scan.unit, scan.fmt.scale_type)
        best = best.better(_judged(scan, replace(start, scale=stored, point=_integer(scan.fmt, point))))
        penalty *= GROWTH
    return best


def _integer(fmt: IntegerFormat, point: Tensor | None) -> Tensor | None:
    return None if point is None else point.round().clamp(fmt.lowest, fmt.highest)


def _step(scan: Scan, scale: Tensor, point: Tensor | None, penalty: float) -> tuple[Tensor, Tensor | None]:
    """Take the outliers out of the errors, then fit scale (and zero point) to what is left of the weights."""
    count = scan.weights.shape[scan.axis]
    level, square, target, product = (torch.zeros_like(scan.unit) for _ in range(4))
    for part in scan.parts():
        levels = _levels(scan, part, scale, point)
        steps = part / scale
        rest = steps.sub_(_outliers(steps - levels, penalty))
        level += levels.sum(dim=scan.axis, keepdim=True)
        square += levels.square().sum(dim=scan.axis, keepdim=True)
        target += rest.sum(dim=scan.axis, keepdim=True)
        product += rest.mul_(levels).sum(dim=scan.axis, keepdim=True)
    if point is None:
        return scale * _slope(product, square), None
    slope = _slope(product - level * target / count, square - level.square() / count)
    offset = (target - slope * level) / count
    return scale * slope, (point - offset / slope).clamp(scan.fmt.lowest, scan.fmt.highest)


def _slope(product: Tensor, square: Tensor) -> Tensor:
    """The factor of the scale, kept near 1 so that no step leaps; 1 where all weights have one level."""
    return torch.where(square > 0, product / square, 1.0).clamp(0.5, 2.0)


def _outliers(errors: Tensor, penalty: float) -> Tensor:
    """argmin over e of |e|^p + penalty / 2 * (e - error)^2 to first order: the generalized soft threshold."""
    size = errors.abs()
    tiny = torch.finfo(errors.dtype).tiny
    return errors.sign().mul_(
        size.sub_(size.clamp(min=tiny).pow_(POWER - 1).mul_(POWER / penalty)).clamp_(min=0)
    )


def _levels(scan: Scan, part: Tensor, scale: Tensor, point: Tensor | None) -> Tensor:
    """The integers less a zero point that need not be one."""
    levels = torch.div(part, scale, out=scan.buffer.narrow(1, 0, part.shape[1]))
    if point is None:
        return levels.round_().clamp_(scan.fmt.lowest, scan.fmt.highest)
    return levels.add_(point).round_().clamp_(scan.fmt.lowest, scan.fmt.highest).sub_(point)
