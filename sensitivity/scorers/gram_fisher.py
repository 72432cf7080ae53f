"""Products of per-sample gradients with every weight error: a quadratic model from backward passes.

v[n, (l, c)] = g_n . dW[l, c] with labels sampled from the model; A = v'v / 2N estimates the divergence of a
plan as x'Ax (Bitplan, docs/metrics.md; to second order it is the matrix of `gram_output`). One backward pass
per sample and draw serves all layers and schemes. Draws go on, four at a time, until two halves of them rank
random plans alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator
from sensitivity.gram import plan_stability, shrunk_factor
from sensitivity.scorers.combining import require_done, row_of_draws
from sensitivity.scorers.protocol import Done
from sensitivity.scorers.sample_blocks import Objective, products, sample_bounds
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from torch import Tensor

    from sensitivity.session import Session
    from sensitivity.tasks.task import Batch, Outputs

NAME = "gram_fisher"
DRAWS = 4
MOST_DRAWS = 32
STABLE = 0.98
"""Reliability of the ranking of plans (Spearman-Brown) that ends the draws."""

Floats = NDArray[np.float64]


class GramFisher:
    """`products` (samples, draws, layers, schemes) holds g . dW; the score is half its mean square."""

    judges_alone = True

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """The missing blocks of the next round of draws; () when the ranking of plans is stable."""
        for rounds in range(1, MOST_DRAWS // DRAWS + 1):
            missing = [unit for unit in _units(plan, rounds) if unit.key not in done]
            if missing:
                return tuple(missing)
            if plan_stability(_products(plan, done, rounds), plan.settings.seed) >= STABLE:
                break
        return ()

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """One forward pass per sample, one backward pass per draw."""
        start, stop, first, last = _bounds(unit)
        found = products(session, unit, range(start, stop), _drawn(session, first), last - first)
        for *_, layer, scheme in np.argwhere(~np.isfinite(found))[:1]:
            raise NonFiniteScore(NAME, unit.layers[layer], unit.schemes[scheme], "NaN or infinity")
        return {"products": found}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Half the mean square over samples and draws; the standard error is over samples."""
        values = (self.products(plan, done) ** 2).mean(axis=1) / 2
        return tuple(
            row_of_draws(layer, scheme, NAME, values[:, i, j])
            for i, layer in enumerate(plan.layers)
            for j, scheme in enumerate(plan.schemes)
        )

    def factor(self, plan: BlockPlan, done: Done) -> Floats:
        """(layers, schemes, d): inner products of different choices are their interactions, noise shrunk."""
        products = self.products(plan, done)
        return shrunk_factor(products.reshape(-1, *products.shape[2:]))

    def products(self, plan: BlockPlan, done: Done) -> Floats:
        """(samples, draws, layers, schemes) of all rounds. Raises ValueError while blocks are missing."""
        require_done(self.blocks(plan, done))
        rounds = 1
        while rounds < MOST_DRAWS // DRAWS and all(u.key in done for u in _units(plan, rounds + 1)):
            rounds += 1
        return _products(plan, done, rounds)


def _units(plan: BlockPlan, rounds: int) -> list[BlockUnit]:
    """The blocks of the first rounds of draws."""
    found = []
    for first in range(0, rounds * DRAWS, DRAWS):
        for start, stop in sample_bounds(plan):
            block = f"samples:{start}:{stop}:draws:{first}:{first + DRAWS}"
            found.append(BlockUnit(NAME, block, plan.schemes, plan.layers))
    return found


def _bounds(unit: BlockUnit) -> tuple[int, int, int, int]:
    _, start, stop, _, first, last = unit.block.split(":")
    return int(start), int(stop), int(first), int(last)


def _products(plan: BlockPlan, done: Done, rounds: int) -> Floats:
    blocks: dict[int, list[Floats]] = {}
    for unit in _units(plan, rounds):
        blocks.setdefault(_bounds(unit)[0], []).append(done[unit.key]["products"])
    return np.concatenate([np.concatenate(parts, axis=1) for parts in blocks.values()])


def _drawn(session: Session, first: int) -> Objective:
    """The log-likelihood of a label drawn from the model, a new one with every draw from `first` on."""

    def objective(outputs: Outputs, batch: Batch, sample: int, draw: int) -> Tensor:
        generator = keyed_generator((session.spec.seed, NAME, sample, first + draw))
        return session.task.sampled_objective(outputs, generator)

    return objective
