"""What block metrics share when they combine their blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sensitivity.estimators import mean_estimate
from sensitivity.units import BlockUnit, ScoreRow


def require_done(missing: Sequence[BlockUnit]) -> None:
    """Raise ValueError where blocks are missing."""
    if missing:
        raise ValueError(
            f"all blocks must be done. Got {len(missing)} missing, the first {missing[0].block!r}:"
            " ask blocks() again."
        )


def row_of_draws(layer: str, scheme: str, metric: str, draws: NDArray[np.float64]) -> ScoreRow:
    """A score that is the mean of independent draws (n,).

    >>> row_of_draws("fc", "w4", "fisher", np.array([1.0, 3.0]))
    ScoreRow(layer='fc', scheme='w4', metric='fisher', value=2.0, stderr=1.0, samples=2)
    """
    found = mean_estimate(draws)
    return ScoreRow(layer, scheme, metric, found.value, found.stderr, found.n, draws)
