"""Signal to quantization noise at the model's output (as MixDQ, Zhao et al. 2024, arXiv:2405.17873)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sensitivity.choice import Measured, OutputChoice

LOSSLESS_DB = 200.0
"""The score of a lossless scheme, and the highest there is: float32 noise alone gives about 140 dB."""


class Sqnr:
    """10 log10(sum y^2 / sum (y - y_q)^2) over the whole scoring part, in decibels; more is better."""

    def score(self, choice: OutputChoice) -> Measured:
        """One pass over the scoring part; standard error by the delta method."""
        from sensitivity.choice import Measured

        signal, noise = [], []
        for pair in choice.pairs():
            signal.append(pair.reference.sums(pair.reference.rows.double().square().sum(-1)))
            errors = (pair.outputs.rows - pair.reference.rows).double().square().sum(-1)
            noise.append(pair.reference.sums(errors))
        sums = np.concatenate(signal), np.concatenate(noise)
        value, stderr = decibels(*sums)
        return Measured(value, stderr, len(sums[0]), per_sample=value + influences(*sums))


def decibels(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> tuple[float, float]:
    """Ratio of the sums in dB, capped at LOSSLESS_DB, with the standard error of the ratio of means.

    >>> decibels(np.array([100.0, 100.0]), np.array([1.0, 1.0]))
    (20.0, 0.0)
    >>> decibels(np.array([1.0, 2.0]), np.array([0.0, 0.0]))
    (200.0, 0.0)
    """
    total_signal, total_noise = float(signal.sum()), float(noise.sum())
    if not math.isfinite(total_signal + total_noise):
        return math.nan, math.nan
    if total_noise == 0 or total_signal / total_noise >= 10 ** (LOSSLESS_DB / 10):
        return LOSSLESS_DB, 0.0
    if total_signal == 0:
        return -math.inf, 0.0
    stderr = float(influences(signal, noise).std(ddof=1)) / math.sqrt(len(signal))
    return 10 * math.log10(total_signal / total_noise), stderr


def influences(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each sample pulls the ratio of means, in dB to first order; their mean is 0.

    >>> influences(np.array([1.0, 1.0]), np.array([1.0, 3.0])).round(2).tolist()
    [2.17, -2.17]
    """
    if not signal.any() or not noise.any():
        return np.zeros(len(signal))
    return np.asarray(10 / math.log(10) * (signal / signal.mean() - noise / noise.mean()))
