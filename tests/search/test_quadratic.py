from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from search.budget import parse_limits
from search.compile import CompileError, compile_problem
from search.deadline import Deadline
from search.moves import moves_from, room_of
from search.pairwise import PairwiseModel, additive_model, factor_of, pairwise_model
from search.problem import Problem, ProblemError
from search.solve import solve
from search.solvers.quadratic import descend, solve_quadratic
from sensitivity.table import ScoreTable


def _model(problem: Problem, seed: int, size: float = 1.0) -> PairwiseModel:
    rng = np.random.default_rng(seed)
    scale = np.sqrt(np.abs(problem.costs))[:, :, None]
    return PairwiseModel(problem.costs, size * scale * rng.normal(size=(*problem.costs.shape, 5)))


def test_predicted_differences_are_differences_of_values(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(6, 3, 2)
    model, room, start = _model(problem, 1), room_of(problem), (0, 1, 2, 0, 1, 0)
    moves = moves_from(room, start)
    singles = model.singles(moves)
    cells = np.arange(len(moves.group))
    pairs = model.pairs(moves, cells, singles)
    base = model.value(start)
    for i in cells:
        assert model.value(moves.apply((i,))) - base == pytest.approx(singles[i], rel=1e-9, abs=1e-9 * base)
        for j in cells[moves.group != moves.group[i]]:
            assert model.value(moves.apply((i, j))) - base == pytest.approx(pairs[i, j], abs=1e-9 * base)


@pytest.mark.parametrize("seed", range(8))
def test_local_search_finds_the_best_plan_of_small_problems(
    knapsack: Callable[..., Problem], seed: int
) -> None:
    problem = knapsack(6, 3, seed=seed)
    model = _model(problem, seed)
    start = solve(problem).choice
    assert start is not None
    found = solve_quadratic(problem, model, [start], restarts=20)
    best = min(model.value(choice) for choice in product(range(3), repeat=6) if problem.feasible(choice))
    assert problem.feasible(found.choice)
    assert found.value == pytest.approx(best, rel=1e-9)


def test_it_is_never_worse_than_its_starts_and_deterministic(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(30, 6, 2)
    model = _model(problem, 3)
    start = solve(problem).choice
    assert start is not None
    found = solve_quadratic(problem, model, [start], restarts=3)
    assert found.value < model.value(start)
    assert found == solve_quadratic(problem, model, [start], restarts=3)
    assert problem.feasible(found.choice)


def test_without_interactions_it_fills_the_budget(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(20, 5)
    optimum = solve(problem)
    assert optimum.objective is not None
    poor = tuple(int(i) for i in problem.rows[0].usage.argmin(axis=1))
    reached = descend(room_of(problem), additive_model(problem), poor, Deadline())
    assert problem.feasible(reached)
    assert problem.objective(reached) < 1.2 * optimum.objective < problem.objective(poor)


def test_a_start_must_be_feasible(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(4, 3, fill=0.0)
    with pytest.raises(ProblemError, match="must start from feasible choices"):
        solve_quadratic(problem, additive_model(problem), [(2, 2, 2, 2)])
    with pytest.raises(ProblemError, match="must start from feasible choices"):
        solve_quadratic(problem, additive_model(problem), [])


def test_tied_layers_interact_within_their_group(table: Callable[..., ScoreTable]) -> None:
    values = [[0.9, 0.1], [0.5, 0.2], [0.3, 0.1]]
    factor = np.random.default_rng(0).normal(size=(3, 2, 4))
    weight = 0.5
    tied = compile_problem(table(values, groups={0: "g", 2: "g"}), limits=parse_limits([]))
    model = pairwise_model(tied, factor, weight)
    for group, single in product(range(2), repeat=2):
        chosen = [group, single, group]
        vectors = [factor[layer, scheme] for layer, scheme in enumerate(chosen)]
        cross = sum(float(a @ b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j)
        additive = sum(values[layer][scheme] for layer, scheme in enumerate(chosen))
        assert model.value((group, single)) == pytest.approx(additive + weight * cross)


def test_a_gram_matrix_can_stand_for_its_factor() -> None:
    factor = np.random.default_rng(0).normal(size=(3, 2, 4))
    gram = factor.reshape(6, 4) @ factor.reshape(6, 4).T
    again = factor_of(gram, 3, 2)
    assert np.allclose(np.einsum("lcd,mhd->lcmh", again, again).reshape(6, 6), gram)


def test_what_does_not_fit_is_refused(table: Callable[..., ScoreTable]) -> None:
    compiled = compile_problem(table([[1.0, 2.0]]))
    with pytest.raises(CompileError, match="must have shape"):
        pairwise_model(compiled, np.zeros((2, 2, 1)), 1.0)
    with pytest.raises(CompileError, match="finite, 0 or more"):
        pairwise_model(compiled, np.zeros((1, 2, 1)), -1.0)
    with pytest.raises(CompileError, match="finite, 0 or more"):
        pairwise_model(compiled, np.full((1, 2, 1), np.nan), 1.0)
    with pytest.raises(CompileError, match="to minimize"):
        pairwise_model(compile_problem(table([[1.0, 2.0]], direction="max")), np.zeros((1, 2, 1)), 1.0)
    with pytest.raises(CompileError, match="must have shape"):
        factor_of(np.zeros((3, 3)), 1, 2)
