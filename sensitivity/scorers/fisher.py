"""Fisher information along the weight error, with labels sampled from the model.

Half the mean over samples of (g . dW)^2, g the gradient of the log-likelihood of a sampled label: to
second order the divergence that `output_kl` measures (Amari 1998; sampled labels, not the empirical Fisher:
Kunstner et al. 2019, arXiv:1905.12558). One backward pass per sample serves all layers and schemes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator, mean_estimate
from sensitivity.scorers.protocol import Done
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.session import Session

NAME = "fisher"
BLOCK_SAMPLES = 8


class Fisher:
    """Blocks of samples; `values` (samples, layers, schemes) holds (g . dW)^2 / 2."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """All blocks that are not done."""
        return tuple(unit for unit in _units(plan) if unit.key not in done)

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """One backward pass per sample; a gradient is used and dropped as soon as it is known."""
        start, stop = (int(number) for number in unit.block.split(":")[1:])
        values = np.stack([_sample_values(session, unit, index) for index in range(start, stop)])
        for sample, layer, scheme in np.argwhere(~np.isfinite(values))[:1]:
            raise NonFiniteScore(
                NAME, unit.layers[layer], unit.schemes[scheme], str(values[sample, layer, scheme])
            )
        return {"values": values}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Means over all samples with their standard errors."""
        missing = [unit.block for unit in _units(plan) if unit.key not in done]
        if missing:
            raise ValueError(
                f"all blocks must be done. Got {len(missing)} missing, the first {missing[0]!r}."
            )
        values = np.concatenate([done[unit.key]["values"] for unit in _units(plan)])
        return tuple(
            _row(layer, scheme, values[:, i, j])
            for i, layer in enumerate(plan.layers)
            for j, scheme in enumerate(plan.schemes)
        )


def _units(plan: BlockPlan) -> tuple[BlockUnit, ...]:
    starts = range(0, plan.samples, BLOCK_SAMPLES)
    bounds = [(start, min(start + BLOCK_SAMPLES, plan.samples)) for start in starts]
    return tuple(BlockUnit(NAME, f"samples:{a}:{b}", plan.schemes, plan.layers) for a, b in bounds)


def _row(layer: str, scheme: str, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> ScoreRow:
    estimate = mean_estimate(values)
    return ScoreRow(layer, scheme, NAME, estimate.value, estimate.stderr, estimate.n)


def _sample_values(
    session: Session, unit: BlockUnit, index: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(g . dW)^2 / 2 of one sample for each layer and scheme, (layers, schemes)."""
    values = np.zeros((len(unit.layers), len(unit.schemes)))

    def contract(position: int, gradient: Tensor) -> None:
        for column, scheme in enumerate(unit.schemes):
            error = session.weights.error(unit.layers[position], scheme)
            values[position, column] = float(gradient.reshape(-1).to(error.dtype).dot(error)) ** 2 / 2

    with session.gradients(unit.layers, contract):
        outputs = session.differentiable_outputs("scoring", index)
        generator = keyed_generator((session.spec.seed, NAME, index))
        objective = session.task.sampled_objective(outputs, generator)
        if not math.isfinite(float(objective.detach())):
            raise NonFiniteScore(f"{NAME} on sample {index}", "", "", str(float(objective.detach())))
        session.backward(objective)
    session.spend(3)
    return values
