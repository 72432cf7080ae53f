from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from search.backends import pulp
from search.core import Core, Lagrangian, core_of, lagrangian
from search.deadline import Deadline
from search.outcome import Outcome
from search.problem import Problem, Row
from search.solvers.ilp import Raw, cbc_bound, finish_with, run_cbc, run_highs

COSTS = np.array([[3.0, 1.0], [5.0, 2.0]])
USAGE = np.array([[1, 2], [1, 2]])


@pytest.fixture
def core() -> Core:
    """Only one of the two groups can have its better cell; the best choice is (0, 1)."""
    return core_of(Problem(COSTS, (Row("x", "<=", USAGE, 3),)))


@pytest.fixture
def bound(core: Core) -> Lagrangian:
    return lagrangian(core, [Fraction(2)])


def _values(choice: tuple[int, ...], one: float = 1.0) -> dict[str, float]:
    return {
        f"x_{g}_{c}": one if c == chosen else 1 - one for g, chosen in enumerate(choice) for c in range(2)
    }


def _scripted(*answers: Raw) -> Callable[[Any, Deadline], Raw]:
    script = iter(answers)
    return lambda program, deadline: next(script)


@pytest.mark.parametrize("backend", [run_highs, run_cbc])
def test_backends_solve_and_bound(core: Core, bound: Lagrangian, backend: Any) -> None:
    outcome = finish_with(backend, core, bound, None, Deadline())
    assert outcome.choice == (0, 1)
    assert outcome.lower is not None
    assert float(outcome.lower * core.unit) == pytest.approx(5.0)
    assert outcome.lower * core.unit <= 5


@pytest.mark.parametrize("backend", [run_highs, run_cbc])
def test_backends_prove_infeasibility(backend: Any) -> None:
    rows = (Row("x", "<=", USAGE, 3), Row("y", "<=", USAGE[:, ::-1], 2))
    core = core_of(Problem(COSTS, rows))
    outcome = finish_with(backend, core, lagrangian(core, [Fraction(0)] * 2), None, Deadline())
    assert outcome.infeasible
    assert outcome.choice is None


def test_values_near_one_are_rounded(core: Core, bound: Lagrangian) -> None:
    outcome = finish_with(_scripted(Raw(_values((0, 1), 0.9999), 5.0, False)), core, bound, None, Deadline())
    assert outcome.choice == (0, 1)


def test_answers_that_break_a_limit_are_cut_off(core: Core, bound: Lagrangian) -> None:
    programs: list[Any] = []

    def backend(program: Any, deadline: Deadline) -> Raw:
        programs.append(len(program.constraints) if isinstance(program.constraints, dict) else 0)
        return Raw(_values((1, 1) if len(programs) == 1 else (0, 1)), 0.0, False)

    outcome = finish_with(backend, core, bound, None, Deadline())
    assert outcome.choice == (0, 1)
    assert len(programs) == 2


def test_a_backend_that_never_keeps_the_limit_proves_nothing(core: Core, bound: Lagrangian) -> None:
    def backend(program: Any, deadline: Deadline) -> Raw:
        return Raw(_values((1, 1)), 0.0, False)

    outcome = finish_with(backend, core, bound, (1, 0), Deadline())
    assert outcome.choice == (1, 0)
    assert not outcome.proven
    assert "break a limit" in outcome.log[-1]


def test_stopping_without_an_answer_keeps_the_incumbent(core: Core, bound: Lagrangian) -> None:
    outcome = finish_with(_scripted(Raw({}, float("-inf"), False)), core, bound, (1, 0), Deadline())
    assert outcome == Outcome((1, 0), None, log=outcome.log)


def test_infeasible_is_not_believed_beside_a_feasible_choice(core: Core, bound: Lagrangian) -> None:
    outcome = finish_with(_scripted(Raw({}, float("-inf"), True)), core, bound, (1, 0), Deadline())
    assert outcome.choice == (1, 0)
    assert not outcome.infeasible
    assert not outcome.proven


def test_at_a_time_limit_pulp_says_optimal_and_the_bound_says_not() -> None:
    rng = np.random.default_rng(0)
    usage = rng.integers(10**5, 10**6, (60, 12))
    program = pulp.LpProblem("hard", pulp.LpMinimize)
    cells = [[program.add_variable(f"x_{g}_{c}", 0, 1, "Integer") for c in range(12)] for g in range(60)]
    program += pulp.lpSum([float(rng.integers(1, 10**6)) * x for row in cells for x in row])
    for row in cells:
        program += pulp.lpSum(row) == 1
    for _ in range(6):
        usage = rng.integers(1, 10**6, (60, 12))
        terms = [float(usage[g, c]) * x for g, row in enumerate(cells) for c, x in enumerate(row)]
        program += pulp.lpSum(terms) <= float(usage.mean() * 50)
    raw = run_highs(program, Deadline.after(0.3))
    assert not raw.infeasible
    cost = pulp.value(program.objective)
    assert not raw.values or cost is None or raw.bound < cost - 1


@pytest.mark.parametrize(
    ("log", "bound"),
    [
        ("Result - Optimal solution found\n\nObjective value:                12.50000000\n", 12.5),
        (
            "Result - Stopped on time limit\n\nObjective value: 13.0\nLower bound:     11.250\nGap: 0.1\n",
            11.25,
        ),
        ("Result - Stopped on time limit\n\nNo feasible solution found\n", float("-inf")),
        ("", float("-inf")),
    ],
)
def test_the_bound_of_cbc_comes_from_its_log(log: str, bound: float) -> None:
    assert cbc_bound(log) == bound
