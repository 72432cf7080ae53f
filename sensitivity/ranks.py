"""How well one list of numbers ranks what another one measures, and how far samples let it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sensitivity.spec import Json

RESAMPLES = 500
SPLITS = 20
LEAST = 3
"""Fewer numbers have no rank correlation worth a name."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """A rank correlation, -1 to 1, with the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, Json]:
        """Plain JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho and Kendall's tau-b over `n` pairs."""

    spearman: Correlation
    kendall: Correlation
    n: int


def rank_correlation(
    predicted: ArrayLike, measured: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> RankCorrelation | None:
    """Both coefficients of two lists (n,), the pairs resampled for the intervals; None where they say
    nothing: fewer than 3 pairs, or a list of equal numbers.

    The same seed draws the same pairs, so intervals over the same `measured` belong together.

    >>> found = rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0])
    >>> round(found.spearman.value, 3), round(found.kendall.value, 3)
    (0.8, 0.667)
    """
    left, right = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(f"Two lists must have the same length. Got {left.shape} and {right.shape}.")
    if len(left) < LEAST or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    drawn = np.random.default_rng(seed).integers(len(left), size=(resamples, len(left)))
    drawn = drawn[(np.ptp(left[drawn], axis=1) > 0) & (np.ptp(right[drawn], axis=1) > 0)]
    rows = np.vstack([np.arange(len(left)), drawn])
    rho, tau = spearman(left[rows], right[rows]), _kendall(left, right, rows)
    return RankCorrelation(_interval(rho), _interval(tau), len(left))


def split_half(*draws: ArrayLike, seed: int = 0, splits: int = SPLITS) -> float | None:
    """Reliability of the order of column means of `draws` (n, m): Spearman between two halves of the rows,
    averaged over random splits, stepped up to all rows (Spearman-Brown).

    Several matrices are ranked as one; those of equal length are split alike. Columns that hold NaN are left
    out. None below 4 rows or 3 columns, or where all means are equal.

    >>> round(split_half(np.tile([1.0, 2.0, 3.0], (8, 1))), 6)
    1.0
    """
    values = [_offered(np.asarray(block, dtype=np.float64)) for block in draws]
    if not values or min(map(len, values)) < 2 * 2 or sum(block.shape[1] for block in values) < LEAST:
        return None
    random = np.random.default_rng(seed)
    halves = [_halves(values, random) for _ in range(splits)]
    first, second = (np.stack([pair[side] for pair in halves]) for side in (0, 1))
    told = (np.ptp(first, axis=1) > 0) & (np.ptp(second, axis=1) > 0)
    if not told.any():
        return None
    agreement = float(spearman(first[told], second[told]).mean())
    return stepped_up(agreement)


def stepped_up(agreement: float) -> float:
    """The reliability of a whole from the correlation of its halves (Spearman 1910, Brown 1910); 0 for none.

    >>> stepped_up(0.5), stepped_up(-0.2)
    (0.6666666666666666, 0.0)
    """
    return 2 * agreement / (1 + agreement) if agreement > 0 else 0.0


def as_json(found: RankCorrelation | None) -> Mapping[str, Json]:
    """Both coefficients as JSON, null where there are none."""
    if found is None:
        return {"spearman": None, "kendall": None}
    return {"spearman": found.spearman.as_json(), "kendall": found.kendall.as_json()}


def _offered(values: Floats) -> Floats:
    """The columns without NaN."""
    return np.asarray(values[:, ~np.isnan(values).any(axis=0)])


def _halves(values: Sequence[Floats], random: np.random.Generator) -> tuple[Floats, Floats]:
    """Column means of a random half of the rows, and of the other half."""
    orders = {length: random.permutation(length) for length in sorted({len(block) for block in values})}
    parts = [(block[orders[len(block)]], len(block) // 2) for block in values]
    first = np.concatenate([block[:middle].mean(axis=0) for block, middle in parts])
    return first, np.concatenate([block[middle:].mean(axis=0) for block, middle in parts])


def spearman(left: Floats, right: Floats) -> Floats:
    """Of each row of two matrices (rows, n)."""
    from scipy.stats import spearmanrho

    return np.asarray(spearmanrho(left, right, axis=-1).statistic)


def _kendall(left: Floats, right: Floats, rows: NDArray[np.int64]) -> Floats:
    """Tau-b of the pairs that each row of `rows` (resamples, n) draws: quadratic forms of how often it draws
    each, so that the signs of all differences are taken once (scipy goes through every row anew).
    """
    counts = np.stack([np.bincount(row, minlength=len(left)) for row in rows]).astype(np.float64)
    signs = [np.sign(values[:, None] - values[None]) for values in (left, right)]
    both, *untied = (
        ((counts @ matrix) * counts).sum(axis=1) for matrix in (signs[0] * signs[1], *map(np.abs, signs))
    )
    return np.asarray(both / np.sqrt(untied[0] * untied[1]))


def _interval(values: Floats) -> Correlation:
    """The first value, between the quantiles of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (-1.0, 1.0)
    return Correlation(float(values[0]), float(low), float(high))
