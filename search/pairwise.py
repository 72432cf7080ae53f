"""The quadratic model of a plan: additive scores on the diagonal, weighted interactions of pairs off it.

    value(x) = sum_g linear[g, x_g] + sum_{g != h} <factor[g, x_g], factor[h, x_h]>

With one-layer KL on the diagonal and lambda * gram_output off it, this ranks plans better than either alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.compile import Compiled, CompileError
from search.moves import Moves
from search.problem import Problem
from sensitivity.gram import positive_factor

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PairwiseModel:
    """`linear` (groups, schemes), NaN where not offered; `factor` (groups, schemes, d). Smaller is better."""

    linear: Floats
    factor: Floats

    def value(self, choice: Sequence[int]) -> float:
        """The predicted value of a choice."""
        rows = np.arange(len(choice))
        return float(self.linear[rows, list(choice)].sum()) + self.interaction(choice)

    def interaction(self, choice: Sequence[int]) -> float:
        """What the pairs of a choice add to its value."""
        picked = self.factor[np.arange(len(choice)), list(choice)]
        total = picked.sum(axis=0)
        return float(total @ total - (picked**2).sum())

    def singles(self, moves: Moves) -> Floats:
        """Shape (changes,): how much each single change would add to the value."""
        here = np.asarray(moves.choice)
        rows = np.arange(len(here))
        picked = self.factor[rows, here]
        rest = picked.sum(axis=0) - picked
        change = self._change(moves, np.arange(len(moves.group)))
        linear = self.linear[moves.group, moves.scheme] - self.linear[moves.group, here[moves.group]]
        return np.asarray(linear + 2 * np.einsum("nd,nd->n", change, rest[moves.group]))

    def pairs(self, moves: Moves, cells: NDArray[np.int64], singles: Floats) -> Floats:
        """Shape (cells, cells): how much two changes of different groups would add together."""
        change = self._change(moves, cells)
        single = singles[cells]
        return np.asarray(single[:, None] + single[None, :] + 2 * change @ change.T)

    def _change(self, moves: Moves, cells: NDArray[np.int64]) -> Floats:
        group, here = moves.group[cells], np.asarray(moves.choice)
        return np.asarray(self.factor[group, moves.scheme[cells]] - self.factor[group, here[group]])


def additive_model(problem: Problem) -> PairwiseModel:
    """The problem's own costs without interactions, turned so that smaller is better."""
    sign = 1.0 if problem.direction == "min" else -1.0
    return PairwiseModel(sign * problem.costs, np.zeros((*problem.costs.shape, 0)))


def pairwise_model(compiled: Compiled, factor: Floats, weight: float) -> PairwiseModel:
    """The compiled metric on the diagonal and `weight` times the interactions off it.

    `factor` has shape (layers, schemes, d) in table order: the gram matrix of two cells is their inner
    product. Layers tied into one group interact too: their inner products join the diagonal of the group.
    Cells that are not offered may hold anything finite. Raises CompileError for a metric to maximize, a
    wrong shape, a negative weight, fused candidates.
    """
    compiled.refuse_fused("The quadratic model")
    table = compiled.table
    if compiled.problem.direction != "min":
        raise CompileError("The quadratic model must have a metric to minimize. Got one to maximize.")
    if factor.ndim != 3 or factor.shape[:2] != (len(table.layers), len(table.schemes)):
        shape = f"({len(table.layers)}, {len(table.schemes)}, d)"
        raise CompileError(f"Interactions must have shape {shape}. Got {factor.shape}.")
    if not weight >= 0 or not np.isfinite(factor).all():
        raise CompileError(f"Interactions and their weight must be finite, 0 or more. Got weight {weight}.")
    summed = np.array([factor[list(layers)].sum(axis=0) for layers in compiled.groups])
    own = np.array([(factor[list(layers)] ** 2).sum(axis=(0, 2)) for layers in compiled.groups])
    within = (summed**2).sum(axis=2) - own
    return PairwiseModel(compiled.problem.costs + weight * within, np.sqrt(weight) * summed)


def factor_of(gram: Floats, layers: int, schemes: int) -> Floats:
    """A factor (layers, schemes, d) whose inner products are `gram` (layers * schemes on both sides).

    Negative eigenvalues, which a gram matrix has by rounding only, are set to 0.
    """
    size = layers * schemes
    if gram.shape != (size, size):
        raise CompileError(f"The gram matrix must have shape ({size}, {size}). Got {gram.shape}.")
    return positive_factor(gram).reshape(layers, schemes, -1)
