"""HIGGS' linear model: divergence grows in proportion to a layer's relative weight error.

alpha * ||dW||^2 / ||W||^2, alpha fitted by least squares to the divergence of the model with Gaussian noise
of known size in that layer (Malinovskii et al. 2024, arXiv:2411.17525). The noise serves every menu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator, mean_estimate
from sensitivity.scorers.combining import require_done
from sensitivity.scorers.protocol import Done
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from sensitivity.session import Session

NAME = "linearity"
LEVELS = (0.03, 0.06, 0.1, 0.15)
"""Relative sizes t of the noise: ||noise||^2 = t^2 ||W||^2, about those of 6 to 3 bits."""


class Linearity:
    """Per layer one block of noisy passes (`divergence`, levels x samples), and one of weight errors."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """All blocks that are not done."""
        units = [unit for layer in plan.layers for unit in (_noise(layer), _errors(plan, layer))]
        return tuple(unit for unit in units if unit.key not in done)

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Divergences per level and sample, or relative squared errors per scheme."""
        if unit.block.endswith(":errors"):
            return _measure_errors(session, unit)
        return _measure_noise(session, unit)

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Rows of alpha times the relative error, with the standard error of alpha over samples."""
        require_done(self.blocks(plan, done))
        return tuple(row for layer in plan.layers for row in _rows(plan, layer, done))


def _noise(layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:noise", (), (layer,))


def _errors(plan: BlockPlan, layer: str) -> BlockUnit:
    return BlockUnit(NAME, f"layer:{layer}:errors", plan.schemes, (layer,))


def _rows(plan: BlockPlan, layer: str, done: Done) -> list[ScoreRow]:
    squares = np.array(LEVELS) ** 2
    slopes = squares @ done[_noise(layer).key]["divergence"] / (squares @ squares)
    alpha = mean_estimate(slopes)
    relative = done[_errors(plan, layer).key]["relative_errors"].tolist()
    return [
        ScoreRow(layer, scheme, NAME, alpha.value * error, alpha.stderr * error, alpha.n, slopes * error)
        for scheme, error in zip(plan.schemes, relative, strict=True)
    ]


def _measure_errors(session: Session, unit: BlockUnit) -> Arrays:
    from sensitivity.contractions import squared_error

    (layer,) = unit.layers
    squares = [squared_error(session.weights, layer, scheme) for scheme in unit.schemes]
    norm = float(session.weights.parameter(layer).detach().double().square().sum())
    return {"relative_errors": np.array(squares) / norm if norm else np.zeros(len(squares))}


def _measure_noise(session: Session, unit: BlockUnit) -> Arrays:
    import torch

    (layer,) = unit.layers
    weight = session.weights.parameter(layer).detach()
    drawn = keyed_generator((session.spec.seed, NAME, layer)).standard_normal(weight.numel())
    noise = torch.from_numpy(drawn).reshape(weight.shape).to(weight.device)
    noise *= weight.double().norm() / noise.norm()
    found = []
    for level in LEVELS:
        noisy = (weight.double() + level * noise).to(weight.dtype)
        parts = [
            session.task.divergence(pair.reference, pair.outputs)
            for pair in session.forwards.replaced_pairs("scoring", {layer: noisy})
        ]
        found.append(np.concatenate(parts))
    divergence = np.stack(found)
    if not np.isfinite(divergence).all():
        raise NonFiniteScore(NAME, layer, "any", "a divergence that is not finite")
    return {"divergence": divergence}
