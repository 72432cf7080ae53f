"""The quadratic model of a plan: scores on the diagonal, a weight times the interactions of pairs off it.

A local search finds plans; what is proven about them comes from two sides. For problems of any size a bound
from the convex hull: value(x) = c'x + |u|^2 with u the sum of the chosen factors, and |u|^2 is never below
its tangent 2 v'u - |v|^2, so for every v an additive program over c + 2 F v bounds all plans from below; v
follows Frank and Wolfe (1956). It needs the factor alone, never the matrix of all pairs. Small problems are
solved exactly as an integer program over products of binaries, linearized with one equation per cell and
group (Adams and Sherali 1986; the program that CLADO states).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations

import numpy as np

from search.compile import Compiled, CompileError
from search.objectives.objective import (
    Entry,
    Floats,
    How,
    ObjectiveError,
    Optimum,
    Part,
    certified,
    short,
    without_fused,
)
from search.objectives.program import Program, cost_terms, extremes, least
from search.pairwise import PairwiseModel, pairwise_model
from search.problem import Choice, Problem, relative_gap
from search.solvers.quadratic import solve_quadratic

ROUNDS, FEW_ROUNDS = 40, 10
"""Steps of the bound where it is the only proof, and where an integer program follows."""
ORACLE_GAP = 1e-7
ROUNDING = 1e-13
MOST_PRODUCTS = 4000
"""Products of binaries in a program that is solved exactly."""


@dataclass(frozen=True)
class Quadratic:
    """The deciding metric's sum plus `weight` times the interactions that the table has."""

    weight: float = 1.0
    metrics: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """With its weight, unless that is 1."""
        return "quadratic" if self.weight == 1 else f"quadratic: {short(self.weight)}"

    def constrained(self, compiled: Compiled) -> Compiled:
        """The problem as it is. Raises ObjectiveError for fused candidates."""
        without_fused("quadratic", compiled)
        return compiled

    def solve(self, compiled: Compiled, how: How) -> Optimum:
        """The best plan of a local search, its bound, and where the problem is small the proven best one."""
        model, problem = self._model(compiled), compiled.problem
        start = how.solve(replace(problem, costs=model.linear))
        if start.choice is None:
            return Optimum(start)
        hull, products = _Hull(problem, model, how), _products(problem)
        hull.run(start.choice, FEW_ROUNDS if products <= MOST_PRODUCTS else ROUNDS)
        left = how.deadline.left() / 2
        found = solve_quadratic(
            problem, model, hull.choices, time_limit=None if math.isinf(left) else max(left, 1e-3)
        )
        best, bound, log = found.choice, hull.bound, [f"hull: bound {hull.bound:.12g}"]
        if relative_gap(found.value, bound) > how.gap and products <= MOST_PRODUCTS:
            best, bound = _exact(problem, model, best, bound, how)
            log.append(f"linearized: bound {bound:.12g} over {products} products")
        value = model.value(best)
        diagonal = float(model.linear[np.arange(len(best)), list(best)].sum())
        parts = (Part("diagonal", diagonal), Part("interactions", value - diagonal))
        return Optimum(certified(best, value, bound, how, log=tuple(log)), parts)

    def _model(self, compiled: Compiled) -> PairwiseModel:
        if not compiled.table.interactions:
            raise ObjectiveError(
                "The objective quadratic must have interactions in the table. Got none. Add them; a search"
                " measures them (gram_output) unless it declines."
            )
        try:
            return pairwise_model(compiled, next(iter(compiled.table.interactions.values())), self.weight)
        except CompileError as error:
            raise ObjectiveError(str(error)) from None


class _Hull:
    """Frank and Wolfe's method over the convex hull of all plans, each step one additive program."""

    def __init__(self, problem: Problem, model: PairwiseModel, how: How) -> None:
        self._problem, self._how = problem, how
        self._factor = model.factor
        self._linear = model.linear - (model.factor**2).sum(axis=2)
        self.bound = -math.inf
        self.choices: list[Choice] = []

    def run(self, start: Choice, rounds: int) -> None:
        """Raises the bound until steps are idle, the rounds are used up, or time is."""
        point, cost = self._picked(start)
        self.choices.append(start)
        for _ in range(rounds):
            tangent = self._linear + 2 * self._factor @ point
            found = self._how.solve(replace(self._problem, costs=tangent), ORACLE_GAP)
            if found.choice is None or found.bound is None:
                return
            size = float(point @ point)
            margin = ROUNDING * (float(np.nanmax(np.abs(tangent), axis=1).sum()) + size)
            self.bound = max(self.bound, found.bound - size - margin)
            if found.choice not in self.choices:
                self.choices.append(found.choice)
            there, other = self._picked(found.choice)
            step, slope = there - point, other - cost + 2 * float(point @ (there - point))
            if slope >= 0 or self._how.deadline.passed():
                return
            length = float(step @ step)
            part = 1.0 if length == 0 else min(1.0, -slope / (2 * length))
            point, cost = point + part * step, cost + part * (other - cost)

    def _picked(self, choice: Choice) -> tuple[Floats, float]:
        """The sum of a choice's factors, and its linear cost."""
        rows, columns = np.arange(len(choice)), list(choice)
        return self._factor[rows, columns].sum(axis=0), float(self._linear[rows, columns].sum())


def _products(problem: Problem) -> int:
    """Pairs of offered cells of different groups."""
    cells = problem.offered.sum(axis=1)
    return int((cells.sum() ** 2 - (cells**2).sum()) // 2)


def _exact(
    problem: Problem, model: PairwiseModel, best: Choice, bound: float, how: How
) -> tuple[Choice, float]:
    """The better of the known plan and the linearized program's, and the better bound."""
    low, high = extremes(np.where(problem.offered, model.linear, np.nan))
    pairs = {}
    for first, second in combinations(range(len(problem.costs)), 2):
        gains = 2 * model.factor[first] @ model.factor[second].T
        inside = gains[np.ix_(problem.offered[first], problem.offered[second])]
        low, high = low + Fraction(float(inside.min())), high + Fraction(float(inside.max()))
        pairs[first, second] = gains - inside.min()

    def build(unit: Fraction) -> Program:
        return _linearized(problem, model.linear, pairs, low, unit)

    found = least(build, problem, lambda choice: Fraction(model.value(choice)), (low, high), how)
    choices = [choice for choice in (found.choice, best) if choice is not None]
    proven = bound if found.bound is None else max(bound, float(found.bound))
    return min(choices, key=model.value), proven


def _linearized(
    problem: Problem, linear: Floats, pairs: dict[tuple[int, int], Floats], low: Fraction, unit: Fraction
) -> Program:
    """A variable per product; those of a cell with all cells of another group sum to the cell. `pairs` are
    what products cost above the cheapest one of their two groups.
    """
    program = Program(problem, low, unit)
    offered = [np.flatnonzero(row).tolist() for row in problem.offered]
    terms = cost_terms(program, linear)
    for (first, second), gains in pairs.items():
        products = {
            (one, other): program.model.add_variable(f"y_{first}_{one}_{second}_{other}", 0, 1)
            for one in offered[first]
            for other in offered[second]
        }
        terms += [(variable, program.scaled(float(gains[cell]))) for cell, variable in products.items()]
        grid = [[products[one, other] for other in offered[second]] for one in offered[first]]
        _sums(program, grid, first)
        _sums(program, list(zip(*grid, strict=True)), second)
    program.minimize(terms)
    return program


def _sums(program: Program, products: Sequence[Sequence[object]], group: int) -> None:
    cells = [variable for (own, _), variable in program.cells.items() if own == group]
    for cell, members in zip(cells, products, strict=True):
        program.add([*((member, 1.0) for member in members), (cell, -1.0)], "==", 0.0)


def _read(arguments: str) -> Quadratic:
    try:
        weight = float(arguments or "1")
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1e6:
        raise ObjectiveError(
            "The objective quadratic must have a weight of the interactions from 0 to 1e6, as in"
            f" 'quadratic: 0.5'. Got {arguments!r:.80}."
        )
    return Quadratic(weight)


QUADRATIC = Entry(
    "quadratic",
    "The sum plus weighted interactions of all pairs; exact when small, else a local search with a bound.",
    ("quadratic", "quadratic: 0.5"),
    _read,
)
