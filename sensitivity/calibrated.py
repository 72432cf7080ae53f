"""Scores of an expensive metric where it was measured, elsewhere those of a cheap one in its unit. Front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PRIOR = 1.0
"""Cells of a layer that its own offset must outweigh."""
FIRST_SPREAD = 1.2
"""Factor between the metrics that is assumed while fewer than LEAST cells were measured."""
LEAST = 6
LEAST_SPREAD = 1.02
DEVIATIONS = 2.0


@dataclass(frozen=True, eq=False)
class Calibrated:
    """`values` (layers, schemes), of which those `measured` are the expensive metric's own.

    `spread`: the expensive score lies between value / spread and value * spread, for about 95 % of cells.
    """

    values: Floats
    measured: NDArray[np.bool_]
    spread: float

    @property
    def low(self) -> Floats:
        """The least that each cell may cost."""
        return self._bound(np.minimum)

    @property
    def high(self) -> Floats:
        """The most that each cell may cost."""
        return self._bound(np.maximum)

    def _bound(self, of_two: np.ufunc) -> Floats:
        ends = of_two(self.values * self.spread, self.values / self.spread)
        return np.where(self.measured, self.values, ends)


def calibrated(cheap: Floats, expensive: Floats) -> Calibrated:
    """Fills the NaN of `expensive` from `cheap`, both (layers, schemes); NaN in both stays.

    log expensive = a + b log cheap + an offset per layer, by least squares over the measured cells, offsets
    shrunk toward 0 as if each layer had PRIOR more cells without any. Cells of which either is not positive
    take no part in the fit.

    >>> cheap = np.array([[1.0, 0.5, 0.25], [8.0, 4.0, 2.0]])
    >>> found = calibrated(cheap, np.where(cheap == 0.5, np.nan, 3 * cheap))
    >>> round(float(found.values[0, 1]), 6), bool(found.measured[0, 1])
    (1.5, False)
    """
    measured = ~np.isnan(expensive)
    usable = measured & (expensive > 0) & (cheap > 0)
    if not usable.any():
        return Calibrated(np.where(measured, expensive, cheap), measured, FIRST_SPREAD)
    log_cheap = np.log(np.where(cheap > 0, cheap, np.nan))
    ratio = np.where(usable, np.log(np.where(usable, expensive, 1.0)) - log_cheap, np.nan)
    slope = _slope(log_cheap, ratio, usable)
    center = float(log_cheap[usable].mean())
    rest = ratio - slope * (log_cheap - center)
    level = float(np.nanmean(rest))
    offsets, residuals = _offsets(rest - level, usable)
    guess = np.exp(log_cheap + level + slope * (log_cheap - center) + offsets[:, None])
    values = np.where(measured, expensive, np.where(np.isnan(guess), cheap, guess))
    return Calibrated(values, measured, _spread(residuals))


def _slope(log_cheap: Floats, ratio: Floats, usable: NDArray[np.bool_]) -> float:
    """How the ratio moves with the score, beyond each layer's own level; 0 where too little is known."""
    x, y = _centered(log_cheap, usable), _centered(ratio, usable)
    power = float((x**2).sum())
    return float((x * y).sum()) / power if int(usable.sum()) >= LEAST and power > 0 else 0.0


def _centered(values: Floats, usable: NDArray[np.bool_]) -> Floats:
    """Less the mean of each layer; 0 where not usable."""
    kept = np.where(usable, values, 0.0)
    counts = np.maximum(usable.sum(axis=1, keepdims=True), 1)
    return np.where(usable, kept - kept.sum(axis=1, keepdims=True) / counts, 0.0)


def _offsets(rest: Floats, usable: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Each layer's offset, and how far each usable cell is from what the others of its layer say."""
    kept = np.where(usable, rest, 0.0)
    counts, sums = usable.sum(axis=1), kept.sum(axis=1)
    without = (sums[:, None] - kept) / (counts[:, None] - 1 + PRIOR)
    return sums / (counts + PRIOR), (rest - without)[usable]


def _spread(residuals: Floats) -> float:
    if len(residuals) < LEAST:
        return FIRST_SPREAD
    return max(LEAST_SPREAD, float(np.exp(DEVIATIONS * np.sqrt((residuals**2).mean()))))
