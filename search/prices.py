"""What each limit costs: the dual multipliers of the problem in the user's own units."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from search.deadline import Deadline
from search.dual import climb
from search.problem import Problem, named_rows
from search.screen import Image, Screen

PRICE_SECONDS = 5.0


def shadow_prices(problem: Problem) -> dict[str, float]:
    """Per limit, how much the objective would improve per unit of the resource by which it is relaxed.

    "<=" is relaxed upward, ">=" downward; prices are 0 or more whatever the objective's direction, and 0 for
    a limit that does not bind. They maximize the Lagrangian bound of the whole problem, so they are the
    slopes of its linear relaxation: where a limit lies on a corner of the frontier, a slope between those of
    both sides. Names are those of the least budget.
    """
    rows = named_rows(problem)
    if not rows:
        return {}
    screen = Screen(Image(problem), [row.upper()[1] for row in problem.rows])
    if screen.impossible:
        return {}
    best = max(climb(screen, Deadline.after(PRICE_SECONDS)), key=lambda visit: visit.value)
    return prices_at(problem, screen, best.point)


def prices_at(problem: Problem, screen: Screen, point: NDArray[np.float64]) -> dict[str, float]:
    """The same from a point where the dual of a problem's screen is largest."""
    rows = named_rows(problem)
    multipliers = screen.multipliers(point, Fraction(1))
    price = {id(row): value for row, value in zip(problem.rows, multipliers, strict=True)}
    return {name: float(price[id(row)] / row.unit) for name, row in rows.items()}
