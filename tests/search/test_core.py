from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.core import core_of, drop_dominated, exact_integers, lagrangian, shrink_by_limits
from search.deadline import Deadline
from search.dual import solve_dual
from search.problem import Problem, Row

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=1, max_size=6))
def test_floats_become_integers_without_loss(values: list[float]) -> None:
    array = np.array(values)
    whole, unit = exact_integers(array)
    assert [Fraction(value) for value in values] == [int(n) * unit for n in whole]


@pytest.mark.parametrize("seed", range(30))
def test_every_lagrangian_is_a_bound_and_accounts_for_the_excess(
    random_case: Callable[[int], Problem], seed: int
) -> None:
    core = core_of(random_case(seed))
    rng = np.random.default_rng(seed)
    bound = lagrangian(core, [Fraction(float(rng.exponential())) for _ in core.usage])
    cells = [np.flatnonzero(row).tolist() for row in core.open]
    for choice in list(product(*cells))[:200]:
        slacks = [limit - used for limit, used in zip(core.limit, core.used(choice), strict=True)]
        reduced = sum(bound.reduced[g, c] for g, c in enumerate(choice))
        priced = sum(m * slack for m, slack in zip(bound.multipliers, slacks, strict=True))
        assert bound.excess(core, choice) == reduced + priced
        if core.feasible(choice):
            assert bound.excess(core, choice) >= 0


def test_the_dual_of_a_knapsack_is_its_linear_relaxation() -> None:
    core = core_of(
        Problem(np.array([[4.0, 0.0], [3.0, 0.0]]), (Row("x", "<=", np.array([[0, 2], [0, 1]]), 2),))
    )
    dual = solve_dual(core, Deadline())
    bound = lagrangian(core, dual.multipliers)
    assert float(Fraction(bound.lower, 2**bound.bits) * core.unit) == pytest.approx(2.0)


def test_cells_that_fit_no_choice_are_closed() -> None:
    core = core_of(Problem(np.zeros((2, 2)), (Row("x", "<=", np.array([[1, 5], [1, 2]]), 4),)))
    assert shrink_by_limits(core)
    assert core.open.tolist() == [[True, False], [True, True]]


def test_an_impossible_limit_is_seen_at_once() -> None:
    core = core_of(Problem(np.zeros((2, 2)), (Row("x", ">=", np.array([[1, 5], [1, 2]]), 8),)))
    assert not shrink_by_limits(core)


def test_of_equal_cells_the_first_stays() -> None:
    usage = np.array([[3, 3, 2, 4]])
    core = core_of(Problem(np.array([[1.0, 1.0, 2.0, 1.0]]), (Row("x", "<=", usage, 9),)))
    drop_dominated(core)
    assert core.open.tolist() == [[True, False, True, False]]
