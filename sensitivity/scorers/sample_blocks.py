"""What metrics of one backward pass per sample share: blocks of samples, means, standard errors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator, mean_estimate
from sensitivity.scorers.protocol import Done
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.gradients import Contract
    from sensitivity.session import Session

BLOCK_SAMPLES = 8
FORWARDS = 3
"""A forward and a backward pass in forward passes."""

PerChoice = NDArray[np.float64]


class SampleBlocks(ABC):
    """A score is the mean over samples of `sample_values`; `values` is (samples, layers, schemes)."""

    name: str

    @abstractmethod
    def sample_values(self, session: Session, unit: BlockUnit, index: int) -> PerChoice:
        """One sample's value for each layer and scheme, (layers, schemes)."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """All blocks that are not done."""
        return tuple(unit for unit in self._units(plan) if unit.key not in done)

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """One sample after another; what a layer's gradient says is taken and the gradient dropped."""
        start, stop = (int(number) for number in unit.block.split(":")[1:])
        values = np.stack([self.sample_values(session, unit, index) for index in range(start, stop)])
        for sample, layer, scheme in np.argwhere(~np.isfinite(values))[:1]:
            raise NonFiniteScore(
                self.name, unit.layers[layer], unit.schemes[scheme], str(values[sample, layer, scheme])
            )
        return {"values": values}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Means over all samples with their standard errors."""
        missing = self.blocks(plan, done)
        if missing:
            raise ValueError(
                f"all blocks must be done. Got {len(missing)} missing, the first {missing[0].block!r}."
            )
        values = np.concatenate([done[unit.key]["values"] for unit in self._units(plan)])
        return tuple(
            self._row(layer, scheme, values[:, i, j])
            for i, layer in enumerate(plan.layers)
            for j, scheme in enumerate(plan.schemes)
        )

    def _units(self, plan: BlockPlan) -> tuple[BlockUnit, ...]:
        starts = range(0, plan.samples, BLOCK_SAMPLES)
        bounds = [(start, min(start + BLOCK_SAMPLES, plan.samples)) for start in starts]
        return tuple(BlockUnit(self.name, f"samples:{a}:{b}", plan.schemes, plan.layers) for a, b in bounds)

    def _row(self, layer: str, scheme: str, values: NDArray[np.float64]) -> ScoreRow:
        estimate = mean_estimate(values)
        return ScoreRow(layer, scheme, self.name, estimate.value, estimate.stderr, estimate.n)


def backward_sampled(
    session: Session, unit: BlockUnit, contract: Contract, index: int, key: tuple[str | int, ...]
) -> None:
    """Gradients of a sampled label's log-likelihood, drawn with `key`, for one sample of the scoring part."""
    with session.gradients(unit.layers, contract):
        outputs = session.differentiable_outputs("scoring", index)
        generator = keyed_generator((session.spec.seed, *key))
        objective = session.task.sampled_objective(outputs, generator)
        backward_finite(session, objective, f"{unit.metric} on sample {index}")


def backward_loss(session: Session, unit: BlockUnit, contract: Contract, index: int) -> None:
    """Gradients of one sample's loss against the truth."""
    with session.gradients(unit.layers, contract):
        loss = session.differentiable_sample_loss("scoring", index)
        backward_finite(session, loss, f"{unit.metric} on sample {index}")


def backward_finite(session: Session, objective: Tensor, what: str) -> None:
    """Backward pass, counted as a forward and a backward. Raises NonFiniteScore for an objective that is not
    finite.
    """
    if not math.isfinite(float(objective.detach())):
        raise NonFiniteScore(what, "", "", str(float(objective.detach())))
    session.backward(objective)
    session.spend(FORWARDS)


def directional(session: Session, unit: BlockUnit, values: PerChoice) -> Contract:
    """Fills `values` (layers, schemes) with g . dW of every scheme as soon as a layer's gradient is known."""

    def contract(position: int, gradient: Tensor) -> None:
        for column, scheme in enumerate(unit.schemes):
            error = session.weights.error(unit.layers[position], scheme)
            values[position, column] = float(gradient.reshape(-1).to(error.dtype).dot(error))

    return contract


def elementwise(session: Session, unit: BlockUnit, values: PerChoice) -> Contract:
    """Fills `values` (layers, schemes) with sum g^2 dW^2: the diagonal of the information alone."""

    def contract(position: int, gradient: Tensor) -> None:
        for column, scheme in enumerate(unit.schemes):
            error = session.weights.error(unit.layers[position], scheme)
            product = gradient.reshape(-1).to(error.dtype) * error
            values[position, column] = float(product.double().square().sum())

    return contract
