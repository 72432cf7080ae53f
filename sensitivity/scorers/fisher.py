"""Fisher information along the weight error.

Half the mean over samples of (g . dW)^2, g the gradient of the log-likelihood of a label: to second order
the divergence that `output_kl` measures when labels are sampled from the model (Amari 1998; Kunstner et al.
2019, arXiv:1905.12558, on sampled and given labels). The diagonal variants keep sum g^2 dW^2 / 2, without the
products between weights of one layer. One backward pass per sample serves all layers and schemes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensitivity.scorers.sample_blocks import (
    PerChoice,
    SampleBlocks,
    products,
    sampled,
    squared_products,
    truth,
)
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from sensitivity.session import Session

DRAWS = "fisher"
"""All variants with sampled labels draw the same ones."""


class Fisher(SampleBlocks):
    """(g . dW)^2 / 2 with labels sampled from the model."""

    name = "fisher"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One backward pass per sample."""
        return products(session, unit, samples, sampled(session, DRAWS))[:, 0] ** 2 / 2


class FisherDiagonal(SampleBlocks):
    """sum g^2 dW^2 / 2 with labels sampled from the model."""

    name = "fisher_diagonal"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One backward pass per sample."""
        return squared_products(session, unit, samples, sampled(session, DRAWS)) / 2


class FisherEmpirical(SampleBlocks):
    """(g . dW)^2 / 2 with the labels of the data."""

    name = "fisher_empirical"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One backward pass per sample."""
        return products(session, unit, samples, truth(session))[:, 0] ** 2 / 2


class FisherEmpiricalDiagonal(SampleBlocks):
    """sum g^2 dW^2 / 2 with the labels of the data."""

    name = "fisher_empirical_diagonal"

    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """One backward pass per sample."""
        return squared_products(session, unit, samples, truth(session)) / 2
