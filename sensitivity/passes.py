"""Gradients of many samples in chosen layers, each contracted as soon as it is known and then dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sensitivity.errors import NonFiniteScore
from sensitivity.gradients import Contract, gradients
from sensitivity.tasks.task import Batch, Outputs

if TYPE_CHECKING:
    from sensitivity.session import Session

BACKWARD_FORWARDS = 2
"""A backward pass in forward passes."""


@dataclass(frozen=True)
class Place:
    """Whose gradient it is: sample `row` of the pass, its draw, the layer's position; and for which schemes
    (`columns`) it is to be contracted now.
    """

    row: int
    draw: int
    position: int
    columns: range


def _nothing_around(row: int, positions: Collection[int], columns: range) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class GradientPass:
    """What is asked for: per sample one forward pass, and a backward pass per draw.

    samples    rows of the scoring part
    objective  (outputs, batch, sample, draw) -> the scalar to differentiate
    take       called once with each gradient and group of columns, in any order of places
    around     entered for (row, positions of layers, columns) while that part of the sample's graph is made
               and used
    """

    metric: str
    layers: tuple[str, ...]
    schemes: tuple[str, ...]
    samples: range
    objective: Callable[[Outputs, Batch, int, int], Tensor]
    take: Callable[[Place, Tensor], None]
    draws: int = 1
    around: Callable[[int, Collection[int], range], AbstractContextManager[None]] = _nothing_around

    def finite_objective(self, outputs: Outputs, batch: Batch, row: int, draw: int) -> Tensor:
        """The scalar of one sample and draw. Raises NonFiniteScore."""
        sample = self.samples[row]
        found = self.objective(outputs, batch, sample, draw)
        if not math.isfinite(float(found.detach())):
            raise NonFiniteScore(f"{self.metric} on sample {sample}", "", "", str(float(found.detach())))
        return found


def run_whole(session: Session, asked: GradientPass) -> None:
    """One sample after another through the whole model."""
    parameters = [session.weights.parameter(name) for name in asked.layers]
    every = range(len(asked.layers))
    for row in range(len(asked.samples)):
        current = [0]
        around = asked.around(row, every, range(len(asked.schemes)))
        with gradients(parameters, _taking(asked, row, current)), around:
            batch = session.sample("scoring", asked.samples[row])
            outputs = session.task.outputs(session.model, batch)
            session.spend(1)
            for draw in range(asked.draws):
                current[0] = draw
                objective = asked.finite_objective(outputs, batch, row, draw)
                if draw < asked.draws - 1:
                    session.backward(objective, retain=True)
                else:
                    session.backward(objective)
                session.spend(BACKWARD_FORWARDS)


def _taking(asked: GradientPass, row: int, draw: list[int]) -> Contract:
    def contract(position: int, gradient: Tensor) -> None:
        asked.take(Place(row, draw[0], position, range(len(asked.schemes))), gradient)

    return contract
