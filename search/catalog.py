"""The solvers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search.core import core_of
from search.deadline import Deadline
from search.outcome import solution_of
from search.problem import Problem, Solution
from search.solvers.brute import solve_brute
from search.solvers.ilp import solve_ilp_cbc, solve_ilp_highs
from search.solvers.lagrangian import Finish, shrink_and_finish, solve_lagrangian

Solve = Callable[[Problem, float, Deadline], Solution]


@dataclass(frozen=True)
class Solver:
    """One solver: what it does and how to call it (problem, target gap, deadline)."""

    name: str
    summary: str
    solve: Solve


def _ilp(finish: Finish) -> Solve:
    def solve(problem: Problem, gap: float, deadline: Deadline) -> Solution:
        core = core_of(problem)
        return solution_of(problem, core, shrink_and_finish(core, gap, deadline, finish), gap)

    return solve


SOLVERS: dict[str, Solver] = {
    "lagrangian": Solver(
        "lagrangian",
        "Lagrangian presolve, exhaustive label search, HiGHS for what is too large.",
        solve_lagrangian,
    ),
    "highs": Solver(
        "highs", "Lagrangian presolve, then the integer program in PuLP with HiGHS.", _ilp(solve_ilp_highs)
    ),
    "cbc": Solver(
        "cbc", "Lagrangian presolve, then the integer program in PuLP with CBC.", _ilp(solve_ilp_cbc)
    ),
    "brute": Solver("brute", "Every choice in exact arithmetic; the oracle for small problems.", solve_brute),
}
AUTO = "lagrangian"
