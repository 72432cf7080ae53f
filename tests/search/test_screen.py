from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from search.core import core_of, exact_sum, lagrangian
from search.deadline import Deadline
from search.dual import climb
from search.problem import Problem, Row
from search.screen import Image, Priced, Screen


@pytest.mark.parametrize("seed", range(40))
def test_float_bounds_hold_in_exact_arithmetic(random_case: Callable[[int], Problem], seed: int) -> None:
    problem = random_case(seed)
    image = Image(problem)
    screen = Screen(image, [row.upper()[1] for row in problem.rows])
    if screen.impossible:
        return
    core = core_of(problem)
    visits = climb(screen, Deadline())
    for visit in (visits[0], visits[-1], max(visits, key=lambda visit: visit.value)):
        priced = Priced(screen, image, visit)
        bound = lagrangian(core, screen.multipliers(visit.point, core.unit))
        unit = core.unit / 2**bound.bits
        for group, scheme in np.argwhere(core.open):
            low = screen.unscaled(float(priced.low[scheme, group]))
            assert low <= bound.reduced[group, scheme] * unit
        cells = [np.flatnonzero(row).tolist() for row in core.open]
        for choice in [c for c in product(*cells) if core.feasible(c)][:50]:
            most = screen.unscaled(priced.excess(np.array(choice)))
            assert bound.excess(core, choice) * unit <= most


def test_a_path_ends_feasible_and_no_worse(knapsack: Callable[..., Problem]) -> None:
    problem = knapsack(200, 6, 2)
    image = Image(problem)
    screen = Screen(image, [row.limit for row in problem.rows])
    visits = climb(screen, Deadline())
    goal = max(visits, key=lambda visit: visit.value)
    start = problem.rows[0].usage.argmin(axis=1)
    assert problem.feasible(tuple(start.tolist()))
    led = screen.path(start, goal.choice, goal.point)
    assert problem.feasible(tuple(led.tolist()))
    assert problem.objective(tuple(led.tolist())) < problem.objective(tuple(start.tolist()))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_known_visits_of_other_limits_save_evaluations(knapsack: Callable[..., Problem], rows: int) -> None:
    image = Image(knapsack(300, 8, rows))
    first, second = ([row.limit for row in knapsack(300, 8, rows, fill=fill).rows] for fill in (0.4, 0.41))
    known = climb(Screen(image, first), Deadline())
    screen = Screen(image, second)
    cold, warm = climb(screen, Deadline()), climb(screen, Deadline(), [screen.anew(v) for v in known])
    tops = [max(visit.value for visit in visits) for visits in (cold, warm)]
    assert tops[1] == pytest.approx(tops[0], rel=1e-8)
    assert len(warm) < len(cold)


def test_costs_of_every_size_are_summed_without_rounding() -> None:
    values = 10.0 ** np.random.default_rng(0).uniform(-300, 300, 200) * np.tile([1.0, -1.0], 100)
    assert exact_sum(values) == sum((Fraction(value) for value in values.tolist()), Fraction(0))
    assert exact_sum(np.zeros(0)) == 0


def test_costs_and_usages_near_the_largest_numbers_do_not_overflow() -> None:
    problem = Problem(
        np.array([[1e308, -1e308], [3.0, 1.0]]), (Row("x", "<=", np.array([[2**61, 0], [0, 2**61]]), 2**61),)
    )
    image = Image(problem)
    assert np.isfinite(image.cost).all()
    assert image.ceiling < 4
