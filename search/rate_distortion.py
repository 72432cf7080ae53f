"""The Gaussian rate-distortion reference: bit widths that need not be whole, from the law D(b) = 2^-2b.

An ideal code of a Gaussian source loses a quarter with each bit more. With a_l the loss of layer l at 0 bits
and P_l its parameters, the least of sum a_l 2^(-2 b_l) under sum P_l b_l = B is at

    b_l = max(0, C + log2(a_l / P_l) / 2)

(reverse water-filling, as Q-Palette uses it). Here a_l is the median over the layer's schemes of score x
4^bits, so real formats may well do better where their losses fall faster than the law: it is a reference to
compare with, not a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sensitivity.table import ScoreTable

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """What the law would make of a plan's bits: over the layers that have weights and a positive score.

    `objective` is its loss, `plan` that of the plan on the same layers; both use `bits_per_weight`. `bits`
    are its bit widths by layer.
    """

    objective: float
    plan: float
    bits_per_weight: float
    bits: Mapping[str, float]


def rate_distortion(table: ScoreTable, metric: str, assignment: Mapping[str, str]) -> Reference | None:
    """The reference beside a plan; None for a metric to maximize, or without bytes or positive scores."""
    scores = table.metrics[metric]
    if scores.direction != "min" or "bytes" not in table.resources:
        return None
    whole, unit = table.whole("bytes")
    stored = whole.astype(np.float64) * float(unit)
    parameters = np.array([layer.parameters for layer in table.layers], dtype=np.float64)
    known = table.offered(metric) & (np.nan_to_num(scores.values) > 0) & (parameters > 0)[:, None]
    rows = np.flatnonzero(known.any(axis=1))
    if not len(rows):
        return None
    column = {name: index for index, name in enumerate(table.schemes)}
    chosen = np.array([column[assignment[table.layers[row].name]] for row in rows])
    bits = 8 * stored[rows] / parameters[rows, None]
    scaled = np.where(known[rows], scores.values[rows] * 4.0**bits, np.nan)
    coefficients, weights = np.nanmedian(scaled, axis=1), parameters[rows]
    used, losses = float(8 * stored[rows, chosen].sum()), float(scores.values[rows, chosen].sum())
    layers = [table.layers[row].name for row in rows]
    ideal = water_filling(coefficients, weights, used)
    lost = float((coefficients * 4.0**-ideal).sum())
    return Reference(
        lost, losses, used / float(weights.sum()), dict(zip(layers, ideal.tolist(), strict=True))
    )


def water_filling(coefficients: Floats, sizes: Floats, bits: float) -> Floats:
    """The bit widths, 0 or more, that minimize sum(coefficients * 4**-width) with sum(sizes * width) == bits.

    >>> water_filling(np.array([1.0, 16.0]), np.array([1.0, 1.0]), 4.0)
    array([1., 3.])
    """
    level = np.log2(coefficients / sizes) / 2
    order = np.argsort(-level)
    covered = np.cumsum(sizes[order])
    offset = (bits - np.cumsum((sizes * level)[order])) / covered
    alive = level[order] + offset > 0
    last = int(np.flatnonzero(alive)[-1]) if alive.any() else 0
    return np.asarray(np.maximum(0.0, level + offset[last]))
