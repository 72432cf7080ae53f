"""Fisher information along the weight error.

Half the mean over samples of (g . dW)^2, g the gradient of the log-likelihood of a label: to second order
the divergence that `output_kl` measures when labels are sampled from the model (Amari 1998; Kunstner et al.
2019, arXiv:1905.12558, on sampled and given labels). The diagonal variants keep sum g^2 dW^2 / 2, without the
products between weights of one layer. One backward pass per sample serves all layers and schemes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sensitivity.scorers.sample_blocks import (
    PerChoice,
    SampleBlocks,
    backward_loss,
    backward_sampled,
    directional,
    elementwise,
)
from sensitivity.units import BlockUnit

if TYPE_CHECKING:
    from sensitivity.session import Session

DRAWS = "fisher"
"""All variants with sampled labels draw the same ones."""


class Fisher(SampleBlocks):
    """(g . dW)^2 / 2 with labels sampled from the model."""

    name = "fisher"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass."""
        values = np.zeros((len(unit.layers), len(unit.schemes)))
        backward_sampled(session, unit, directional(session, unit, values), index, (DRAWS, index))
        return values**2 / 2


class FisherDiagonal(SampleBlocks):
    """sum g^2 dW^2 / 2 with labels sampled from the model."""

    name = "fisher_diagonal"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass."""
        values = np.zeros((len(unit.layers), len(unit.schemes)))
        backward_sampled(session, unit, elementwise(session, unit, values), index, (DRAWS, index))
        return values / 2


class FisherEmpirical(SampleBlocks):
    """(g . dW)^2 / 2 with the labels of the data."""

    name = "fisher_empirical"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass."""
        values = np.zeros((len(unit.layers), len(unit.schemes)))
        backward_loss(session, unit, directional(session, unit, values), index)
        return values**2 / 2


class FisherEmpiricalDiagonal(SampleBlocks):
    """sum g^2 dW^2 / 2 with the labels of the data."""

    name = "fisher_empirical_diagonal"

    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One backward pass."""
        values = np.zeros((len(unit.layers), len(unit.schemes)))
        backward_loss(session, unit, elementwise(session, unit, values), index)
        return values / 2
