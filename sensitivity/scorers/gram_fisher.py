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
from sensitivity.estimators import keyed_generator, mean_estimate
from sensitivity.gram import plan_stability, shrunk_factor
from sensitivity.scorers.protocol import Done
from sensitivity.scorers.sample_blocks import BLOCK_SAMPLES, directional
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from sensitivity.session import Session

NAME = "gram_fisher"
DRAWS = 4
MOST_DRAWS = 32
STABLE = 0.98
"""Reliability of the ranking of plans (Spearman-Brown) that ends the draws."""

Floats = NDArray[np.float64]


class GramFisher:
    """`products` (samples, draws, layers, schemes) holds g . dW; the score is half its mean square."""

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
        products = np.stack([_sample(session, unit, i, range(first, last)) for i in range(start, stop)])
        for *_, layer, scheme in np.argwhere(~np.isfinite(products))[:1]:
            raise NonFiniteScore(NAME, unit.layers[layer], unit.schemes[scheme], "NaN or infinity")
        return {"products": products}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """Half the mean square over samples and draws; the standard error is over samples."""
        values = (self.products(plan, done) ** 2).mean(axis=1) / 2
        rows = []
        for i, layer in enumerate(plan.layers):
            for j, scheme in enumerate(plan.schemes):
                found = mean_estimate(values[:, i, j])
                rows.append(ScoreRow(layer, scheme, NAME, found.value, found.stderr, found.n))
        return tuple(rows)

    def factor(self, plan: BlockPlan, done: Done) -> Floats:
        """(layers, schemes, d): inner products of different choices are their interactions, noise shrunk."""
        products = self.products(plan, done)
        return shrunk_factor(products.reshape(-1, *products.shape[2:]))

    def products(self, plan: BlockPlan, done: Done) -> Floats:
        """(samples, draws, layers, schemes) of all rounds. Raises ValueError while blocks are missing."""
        if self.blocks(plan, done):
            raise ValueError("all blocks must be done. Got some missing: ask blocks() again.")
        rounds = 1
        while rounds < MOST_DRAWS // DRAWS and all(u.key in done for u in _units(plan, rounds + 1)):
            rounds += 1
        return _products(plan, done, rounds)


def _units(plan: BlockPlan, rounds: int) -> list[BlockUnit]:
    """The blocks of the first rounds of draws."""
    found = []
    for first in range(0, rounds * DRAWS, DRAWS):
        for start in range(0, plan.samples, BLOCK_SAMPLES):
            stop = min(start + BLOCK_SAMPLES, plan.samples)
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


def _sample(session: Session, unit: BlockUnit, index: int, draws: range) -> Floats:
    """g . dW of one sample, (draws, layers, schemes)."""
    values = np.zeros((len(draws), len(unit.layers), len(unit.schemes)))
    current = np.zeros(values.shape[1:])
    with session.gradients(unit.layers, directional(session, unit, current)):
        outputs = session.differentiable_outputs("scoring", index)
        session.spend(1)
        for row, draw in enumerate(draws):
            current[:] = 0
            generator = keyed_generator((session.spec.seed, NAME, index, draw))
            objective = session.task.sampled_objective(outputs, generator)
            if not np.isfinite(float(objective.detach())):
                raise NonFiniteScore(f"{NAME} on sample {index}", "", "", str(float(objective.detach())))
            session.backward(objective, retain=draw != draws[-1])
            session.spend(2)
            values[row] = current
    return values
