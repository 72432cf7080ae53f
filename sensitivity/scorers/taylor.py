"""Change of the loss as a Taylor series in the weight error, sample by sample.

First order |g . dW|; with the empirical second-order term |g . dW + (g . dW)^2 / 2|, g the gradient of one
sample's loss. The absolute value is taken per sample, not of the mean gradient, which vanishes at a minimum.
Sources: AutoRound's delta loss, MixLLM (Zheng et al. 2024, arXiv:2412.14590).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sensitivity.scorers.sample_blocks import PerChoice, SampleBlocks, products, truth
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from sensitivity.session import Session


class Taylor(SampleBlocks):
    """Mean over samples of |g . dW + (g . dW)^2 / 2|."""

    name = "taylor"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One backward pass per sample."""
        first = products(session, unit, samples, truth(session))[:, 0]
        return np.abs(first + first**2 / 2)


class TaylorFirst(SampleBlocks):
    """Mean over samples of |g . dW|."""

    name = "taylor_first"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One backward pass per sample."""
        return np.abs(products(session, unit, samples, truth(session))[:, 0])
