"""Change of the loss as a Taylor series in the weight error, sample by sample.

First order |g . dW|; with the empirical second-order term |g . dW + (g . dW)^2 / 2|, g the gradient of one
sample's loss. The absolute value is taken per sample, not of the mean gradient, which vanishes at a minimum.
Sources: AutoRound's delta loss, MixLLM (Zheng et al. 2024, arXiv:2412.14590).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sensitivity.scorers.sample_blocks import PerChoice, SampleBlocks, backward_loss, directional
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from sensitivity.session import Session


class Taylor(SampleBlocks):
    """Mean over samples of |g . dW + (g . dW)^2 / 2|."""

    name = "taylor"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass."""
        first = _directional(session, unit, index)
        return np.abs(first + first**2 / 2)


class TaylorFirst(SampleBlocks):
    """Mean over samples of |g . dW|."""

    name = "taylor_first"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass."""
        return np.abs(_directional(session, unit, index))


def _directional(session: Session, unit: BlockUnit, index: int) -> PerChoice:
    values = np.zeros((len(unit.layers), len(unit.schemes)))
    backward_loss(session, unit, directional(session, unit, values), index)
    return values
