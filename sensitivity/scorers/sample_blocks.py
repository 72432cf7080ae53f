"""What metrics of one backward pass per sample share: blocks of samples, means, standard errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator
from sensitivity.scorers.combining import require_done, row_of_draws
from sensitivity.scorers.protocol import Done
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.session import Session
    from sensitivity.tasks.task import Batch, Outputs

BLOCK_SAMPLES = 8

PerChoice = NDArray[np.float64]
Objective = Callable[["Outputs", "Batch", int, int], "Tensor"]
"""(outputs, batch, sample, draw) -> the scalar to differentiate."""


class SampleBlocks(ABC):
    """A score is the mean over samples of `values` (samples, layers, schemes)."""

    name: str
    judges_alone = True

    @abstractmethod
    def values(self, session: Session, unit: BlockUnit, samples: range) -> PerChoice:
        """Each sample's value for each layer and scheme, (samples, layers, schemes)."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """All blocks that are not done."""
        return tuple(unit for unit in self._units(plan) if unit.key not in done)

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Raises NonFiniteScore for a value that is not finite, naming layer and scheme."""
        start, stop = (int(number) for number in unit.block.split(":")[1:])
        values = self.values(session, unit, range(start, stop))
        for sample, layer, scheme in np.argwhere(~np.isfinite(values))[:1]:
            raise NonFiniteScore(
                self.name, unit.layers[layer], unit.schemes[scheme], str(values[sample, layer, scheme])
            )
        return {"values": values}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Means over all samples with their standard errors."""
        require_done(self.blocks(plan, done))
        values = np.concatenate([done[unit.key]["values"] for unit in self._units(plan)])
        return tuple(
            row_of_draws(layer, scheme, self.name, values[:, i, j])
            for i, layer in enumerate(plan.layers)
            for j, scheme in enumerate(plan.schemes)
        )

    def _units(self, plan: BlockPlan) -> tuple[BlockUnit, ...]:
        return tuple(
            BlockUnit(self.name, f"samples:{start}:{stop}", plan.schemes, plan.layers)
            for start, stop in sample_bounds(plan)
        )


def sample_bounds(plan: BlockPlan) -> list[tuple[int, int]]:
    """First and last sample of each block."""
    starts = range(0, plan.samples, BLOCK_SAMPLES)
    return [(start, min(start + BLOCK_SAMPLES, plan.samples)) for start in starts]


def products(
    session: Session, unit: BlockUnit, samples: range, objective: Objective, draws: int = 1
) -> PerChoice:
    """g . dW of every sample, draw, layer and scheme, (samples, draws, layers, schemes)."""
    return _contracted(session, unit, samples, objective, draws, elementwise=False)


def squared_products(session: Session, unit: BlockUnit, samples: range, objective: Objective) -> PerChoice:
    """sum g^2 dW^2, the diagonal of the information alone, (samples, layers, schemes)."""
    return _contracted(session, unit, samples, objective, 1, elementwise=True)[:, 0]


def _contracted(
    session: Session, unit: BlockUnit, samples: range, objective: Objective, draws: int, *, elementwise: bool
) -> PerChoice:
    from sensitivity.contractions import inner, squared_inner
    from sensitivity.passes import GradientPass, Place

    contract = squared_inner if elementwise else inner
    values = np.zeros((len(samples), draws, len(unit.layers), len(unit.schemes)))

    def take(place: Place, gradient: Tensor) -> None:
        schemes = [unit.schemes[column] for column in place.columns]
        found = contract(session.weights, unit.layers[place.position], schemes, gradient)
        values[place.row, place.draw, place.position, list(place.columns)] = found

    session.take_gradients(
        GradientPass(unit.metric, unit.layers, unit.schemes, samples, objective, take, draws)
    )
    return values


def sampled(session: Session, name: str) -> Objective:
    """The log-likelihood of a label drawn from the model, the same one whenever a sample is asked for."""

    def objective(outputs: Outputs, batch: Batch, sample: int, draw: int) -> Tensor:
        generator = keyed_generator((session.spec.seed, name, sample))
        return session.task.sampled_objective(outputs, generator)

    return objective


def truth(session: Session) -> Objective:
    """The sample's loss against the truth."""

    def objective(outputs: Outputs, batch: Batch, sample: int, draw: int) -> Tensor:
        return session.task.loss(outputs, batch)

    return objective
