"""Measured pairs: what two quantized layers do together beyond each alone (CLADO, Deng et al. 2023).

With L the divergence, G[i,j] = L(i,j) - L(i) - L(j) for choices of different layers and G[i,i] = 2 L(i), so
that x'Gx / 2 models any plan x. G is projected to the positive semidefinite matrices, because curvatures
below zero are noise. The score is L(i) itself.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sensitivity.errors import NonFiniteScore
from sensitivity.gram import positive_factor
from sensitivity.scorers.combining import require_done, row_of_draws
from sensitivity.scorers.protocol import Done
from sensitivity.units import Arrays, BlockPlan, BlockUnit, ScoreRow

if TYPE_CHECKING:
    from sensitivity.session import Session

NAME = "pairwise"
BLOCK_RUNS = 16
"""Passes over the scoring part in one block."""

Floats = NDArray[np.float64]
Cell = tuple[int, int]
"""(layer, scheme) by their places in the plan."""


class Pairwise:
    """`divergence` (runs, samples): every choice alone, then every pair of choices of different layers."""

    def blocks(self, plan: BlockPlan, done: Done) -> tuple[BlockUnit, ...]:
        """All blocks that are not done."""
        return tuple(unit for unit in _units(plan) if unit.key not in done)

    def measure(self, session: Session, unit: BlockUnit) -> Arrays:
        """Divergence per sample of each run of the block."""
        start, stop = _bounds(unit)
        runs = _runs(len(unit.layers), len(unit.schemes))[start:stop]
        return {"divergence": np.stack([_divergence(session, unit, cells) for cells in runs])}

    def combine(self, plan: BlockPlan, done: Done) -> tuple[ScoreRow, ...]:
        """What each choice does alone, with its standard error over samples."""
        values = self._values(plan, done)
        rows = []
        for cells, samples in zip(_runs(*_shape(plan)), values, strict=True):
            if len(cells) == 1:
                ((layer, scheme),) = cells
                rows.append(row_of_draws(plan.layers[layer], plan.schemes[scheme], NAME, samples))
        return tuple(rows)

    def factor(self, plan: BlockPlan, done: Done) -> Floats:
        """(layers, schemes, d): inner products of different choices are half their G, made semidefinite."""
        layers, schemes = _shape(plan)
        gram = pair_matrix(_runs(layers, schemes), self._values(plan, done).mean(axis=1), schemes)
        return positive_factor(gram).reshape(layers, schemes, -1)

    def _values(self, plan: BlockPlan, done: Done) -> Floats:
        """(runs, samples). Raises ValueError while blocks are missing."""
        require_done(self.blocks(plan, done))
        return np.concatenate([done[unit.key]["divergence"] for unit in _units(plan)])


def pair_matrix(runs: list[tuple[Cell, ...]], means: Floats, schemes: int) -> Floats:
    """G / 2 (choices, choices) from the mean divergence of each run; choice = layer * schemes + scheme.

    Two schemes of one layer never meet: their entry is that of changes in the same direction, the root of
    the product of their own.

    >>> runs = [((0, 0),), ((1, 0),), ((0, 0), (1, 0))]
    >>> pair_matrix(runs, np.array([1.0, 2.0, 5.0]), 1).tolist()
    [[1.0, 1.0], [1.0, 2.0]]
    """
    count = sum(len(cells) == 1 for cells in runs)
    own = np.zeros(count)
    gram = np.zeros((count, count))
    for cells, mean in zip(runs, means, strict=True):
        places = [layer * schemes + scheme for layer, scheme in cells]
        if len(places) == 1:
            own[places[0]] = mean
        else:
            first, second = places
            gram[first, second] = gram[second, first] = (mean - own[first] - own[second]) / 2
    for start in range(0, count, schemes):
        block = np.sqrt(np.maximum(own[start : start + schemes], 0.0))
        gram[start : start + schemes, start : start + schemes] = np.outer(block, block)
    np.fill_diagonal(gram, own)
    return gram


def _runs(layers: int, schemes: int) -> list[tuple[Cell, ...]]:
    """Every choice alone, then every pair of choices of different layers."""
    cells = [(layer, scheme) for layer in range(layers) for scheme in range(schemes)]
    pairs = [pair for pair in combinations(cells, 2) if pair[0][0] != pair[1][0]]
    return [*((cell,) for cell in cells), *pairs]


def _shape(plan: BlockPlan) -> tuple[int, int]:
    return len(plan.layers), len(plan.schemes)


def _units(plan: BlockPlan) -> list[BlockUnit]:
    count = len(_runs(*_shape(plan)))
    return [
        BlockUnit(NAME, f"runs:{start}:{min(start + BLOCK_RUNS, count)}", plan.schemes, plan.layers)
        for start in range(0, count, BLOCK_RUNS)
    ]


def _bounds(unit: BlockUnit) -> tuple[int, int]:
    _, start, stop = unit.block.split(":")
    return int(start), int(stop)


def _divergence(session: Session, unit: BlockUnit, cells: tuple[Cell, ...]) -> Floats:
    assignment = tuple((unit.layers[layer], unit.schemes[scheme]) for layer, scheme in cells)
    parts = [
        session.task.divergence(pair.reference, pair.outputs)
        for pair in session.forwards.pairs("scoring", assignment)
    ]
    found = np.concatenate(parts)
    if not np.isfinite(found).all():
        layer, scheme = assignment[-1]
        raise NonFiniteScore(NAME, layer, scheme, str(found[~np.isfinite(found)][0]))
    return found
