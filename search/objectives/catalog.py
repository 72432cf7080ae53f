"""The objectives by name, and the front door to them."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from search.catalog import AUTO
from search.compile import Compiled
from search.deadline import Deadline
from search.objectives.additive import SUM
from search.objectives.lexicographic import LEXICOGRAPHIC
from search.objectives.minimax import MINIMAX, MINIMAX_SUM
from search.objectives.objective import Entry, How, Objective, ObjectiveError, Optimum
from search.objectives.quadratic import QUADRATIC
from search.objectives.rank_order import RANK_ORDER
from search.objectives.threshold import THRESHOLD
from search.objectives.uncertainty import UNCERTAINTY
from search.objectives.weighted import WEIGHTED, WEIGHTED_NORMALIZED
from search.objectives.worst import WORST
from search.problem import DEFAULT_GAP
from search.solve import check

OBJECTIVES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        SUM,
        MINIMAX,
        MINIMAX_SUM,
        WEIGHTED,
        WEIGHTED_NORMALIZED,
        LEXICOGRAPHIC,
        UNCERTAINTY,
        WORST,
        RANK_ORDER,
        QUADRATIC,
        THRESHOLD,
    )
}
DEFAULT = SUM.name


def parse_objective(text: str) -> Objective:
    """Reads an objective: its name and, after a colon, what it takes. Raises ObjectiveError.

    >>> parse_objective("lexicographic: loss within 0.5%, latency").text
    'lexicographic: loss within 0.5%, latency'
    """
    name, _, arguments = text.partition(":")
    if name.strip() not in OBJECTIVES:
        raise ObjectiveError(
            f"An objective must be one of {', '.join(OBJECTIVES)}. Got {text!r:.80}. Write for example"
            f" {', '.join(repr(entry.examples[-1]) for entry in OBJECTIVES.values())}."
        )
    return OBJECTIVES[name.strip()].read(arguments.strip())


def deciding_metric(objective: Objective, metrics: Collection[str], wanted: str | None) -> str | None:
    """The metric to compile a table by: the wanted one; without one, any that an objective names which is
    about nothing else and the table has.
    """
    known = [name for name in objective.metrics if name in metrics]
    names_all = OBJECTIVES[objective.text.partition(":")[0]].names_all
    return known[0] if wanted is None and names_all and known else wanted


def solve_objective(
    compiled: Compiled,
    objective: Objective,
    *,
    solver: str = "auto",
    gap: float = DEFAULT_GAP,
    time_limit: float | None = None,
    prices: bool = False,
) -> Optimum:
    """The best choice for an objective within all limits, ties and pins, and what is proven about it.

    The problem solved is `objective.constrained(compiled)`; the default objective, the sum, is
    `search.solve.solve`. Shadow prices come with what is one additive program at the end. Raises
    ObjectiveError for what the table does not have, ProblemError as `solve`.
    """
    check(gap, time_limit)
    started = time.perf_counter()
    bounded = objective.constrained(compiled)
    found = objective.solve(bounded, How(solver, gap, Deadline.after(time_limit), prices))
    solution = found.solution
    if solution.choice is not None and not bounded.problem.feasible(solution.choice):
        raise RuntimeError(f"{objective.text} must give a feasible choice. Got {solution.choice}.")
    seconds = time.perf_counter() - started
    name = AUTO if solver == "auto" else solver
    return replace(found, solution=replace(solution, seconds=seconds, solver=name))
