from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from search.black_box import black_box
from search.budget import parse_limits
from search.compile import Assignment, Compiled, CompileError, compile_problem
from search.refine import Candidate, Measured
from search.solve import solve


@pytest.fixture
def compiled(table) -> Compiled:
    rng = np.random.default_rng(3)
    values = (10 ** rng.uniform(-1, 0.5, (6, 1)) * np.array([1.0, 0.3, 0.08])).tolist()
    sizes = [[int(size * bits) for bits in (2, 3, 4)] for size in rng.integers(10, 60, 6)]
    limit = sum(row[1] for row in sizes)
    return compile_problem(
        table(values, {"bytes": sizes}), limits=parse_limits([f"bytes<={limit}"]), pins={"l0": "w3"}
    )


class Truth:
    """The measured value is the additive one, but for a price on what the additive optimum gives layer l1."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.measured = compiled, []
        self.bad = _additive(compiled).assignment["l1"]

    def __call__(self, assignments: list[Assignment]) -> list[Measured]:
        self.measured += [tuple(sorted(plan.items())) for plan in assignments]
        return [self._value(plan) for plan in assignments]

    def _value(self, plan: Assignment) -> Measured:
        value = self.compiled.objective(plan) + (3.0 if plan["l1"] == self.bad else 0.0)
        return Measured(value, 0.0, np.array([value]))


def _additive(compiled: Compiled) -> Candidate:
    choice = solve(compiled.problem).choice
    assert choice is not None
    return Candidate("additive", compiled.assignment(choice))


def test_finds_what_the_additive_model_misses(compiled):
    truth, start = Truth(compiled), _additive(compiled)
    found = black_box(compiled, [start], truth, evaluations=60, seed=1)
    plans = [c for c in product(range(3), repeat=6) if compiled.problem.feasible(c)]
    values = sorted(truth([compiled.assignment(choice)])[0].mean for choice in plans)
    additive = truth([dict(start.assignment)])[0].mean
    assert values[0] <= found.measured.mean < additive
    assert found.measured.mean <= values[len(values) // 20]


def test_measures_no_plan_twice_and_none_that_breaks_a_limit(compiled):
    truth = Truth(compiled)
    black_box(compiled, [_additive(compiled)], truth, evaluations=25)
    assert len(set(truth.measured)) == len(truth.measured) > 10
    for plan in truth.measured:
        assert compiled.problem.feasible(compiled.choice(dict(plan)))


def test_the_same_seed_gives_the_same_trace(compiled):
    traces = [
        black_box(compiled, [_additive(compiled)], Truth(compiled), evaluations=12, seed=5).trace
        for _ in "ab"
    ]
    assert [step.assignment for step in traces[0]] == [step.assignment for step in traces[1]]
    assert {step.source for step in traces[0]} == {"additive", black_box.source}


def test_no_evaluations_means_the_best_candidate(compiled):
    candidate = _additive(compiled)
    found = black_box(compiled, [candidate], Truth(compiled), evaluations=0)
    assert (found.source, found.assignment) == ("additive", dict(candidate.assignment))
    with pytest.raises(CompileError, match="at least one candidate"):
        black_box(compiled, [], Truth(compiled))
