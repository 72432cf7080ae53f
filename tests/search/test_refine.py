from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from search.budget import parse_limits
from search.compile import Assignment, Compiled, CompileError, compile_problem
from search.pairwise import PairwiseModel, pairwise_model
from search.refine import Candidate, Measured, refine
from search.solve import solve
from search.solvers.quadratic import solve_quadratic
from sensitivity.table import ScoreTable

Build = Callable[..., ScoreTable]


class Truth:
    """A true quadratic to be measured; counts what was measured."""

    def __init__(self, compiled: Compiled, seed: int) -> None:
        layers, schemes = compiled.table.metrics["loss"].values.shape
        rng = np.random.default_rng(seed)
        scale = np.sqrt(compiled.table.metrics["loss"].values)[:, :, None]
        self.factor = (
            scale * rng.normal(size=(1, 1, 4)) * 0.6 + scale * rng.normal(size=(layers, schemes, 4)) * 0.3
        )
        self._compiled = compiled
        self.model = pairwise_model(compiled, self.factor, 1.0)
        self.measured: list[Assignment] = []

    def __call__(self, assignments: Sequence[Assignment]) -> list[Measured]:
        self.measured += [dict(assignment) for assignment in assignments]
        values = [self.model.value(self._compiled.choice(assignment)) for assignment in assignments]
        return [Measured(value, 0.01, np.array([value, value])) for value in values]


@pytest.fixture
def compiled(table: Build) -> Callable[..., Compiled]:
    def build(layers: int, seed: int = 0, **extra: object) -> Compiled:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(10, 60, layers)
        values = (10 ** rng.uniform(-1.5, 0.5, (layers, 1)) * np.array([1.0, 0.3, 0.08])).tolist()
        sizes_bytes = [[int(size * bits) for bits in (2, 3, 4)] for size in sizes]
        limit = sum(row[1] for row in sizes_bytes)
        built = table(values, {"bytes": sizes_bytes}, groups=extra.pop("groups", {}))
        return compile_problem(built, limits=parse_limits([f"bytes<={limit}"]), **extra)  # type: ignore[arg-type]

    return build


def _additive(compiled: Compiled) -> Candidate:
    choice = solve(compiled.problem).choice
    assert choice is not None
    return Candidate("additive loss", compiled.assignment(choice))


def _uniform(compiled: Compiled) -> Candidate:
    return Candidate("uniform w3", dict.fromkeys(compiled.table.layer_names, "w3"))


def test_measuring_improves_on_the_additive_plan(compiled: Callable[..., Compiled]) -> None:
    lost, left = 0.0, 0.0
    for seed in range(6):
        problem = compiled(7, seed)
        truth = Truth(problem, seed)
        candidates = [_additive(problem), _uniform(problem)]
        refined = refine(problem, candidates, truth, evaluations=40)
        choices = [c for c in product(range(3), repeat=7) if problem.problem.feasible(c)]
        best = min(truth.model.value(choice) for choice in choices)
        start = min(truth.model.value(problem.choice(candidate.assignment)) for candidate in candidates)
        assert best - 1e-9 <= refined.measured.mean <= start
        lost, left = lost + start / best - 1, left + refined.measured.mean / best - 1
    assert lost > 0.05
    assert left < 0.3 * lost


def test_even_a_blind_model_never_makes_it_worse(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(8, 3)
    truth = Truth(problem, 3)
    misleading = PairwiseModel(-problem.problem.costs, -truth.model.factor)
    candidates = [_uniform(problem), _additive(problem)]
    refined = refine(problem, candidates, truth, predicted=misleading, evaluations=15)
    assert refined.measured.mean <= min(step.measured.mean for step in refined.trace)
    assert len(truth.measured) <= 2 + 15


def test_the_trace_tells_every_evaluation_in_order(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(6, 1)
    truth = Truth(problem, 1)
    refined = refine(problem, [_uniform(problem), _additive(problem)], truth, evaluations=12, batch=5)
    assert [step.assignment for step in refined.trace] == truth.measured
    assert [step.source for step in refined.trace[:2]] == ["uniform w3", "additive loss"]
    assert {step.source for step in refined.trace[2:]} == {"local search"}
    assert len(refined.trace) == 14
    accepted = [step.measured.mean for step in refined.trace if step.accepted]
    assert accepted == sorted(accepted, reverse=True)
    assert refined.measured.mean == accepted[-1]
    assert len({tuple(plan.items()) for plan in truth.measured}) == 14


def test_it_repeats_exactly(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(6, 2)
    first, second = Truth(problem, 2), Truth(problem, 2)
    one = refine(problem, [_additive(problem)], first, evaluations=10)
    two = refine(problem, [_additive(problem)], second, evaluations=10)
    assert one.assignment == two.assignment
    assert first.measured == second.measured


def test_ties_pins_and_limits_hold_in_everything_measured(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(8, 4, groups={0: "g", 5: "g"}, pins={"l3": "w4"})
    truth = Truth(problem, 4)
    refine(problem, [_additive(problem)], truth, evaluations=30)
    assert len(truth.measured) > 10
    for plan in truth.measured:
        assert plan["l0"] == plan["l5"]
        assert plan["l3"] == "w4"
        assert problem.problem.feasible(problem.choice(plan))


def test_no_evaluations_means_the_best_candidate(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(5)
    truth = Truth(problem, 0)
    refined = refine(
        problem, [_uniform(problem), _uniform(problem), _additive(problem)], truth, evaluations=0
    )
    assert refined.source == "additive loss"
    assert len(truth.measured) == 2


def test_quadratic_candidates_come_from_the_same_pieces(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(9, 5)
    truth = Truth(problem, 5)
    additive = _additive(problem)
    start = problem.choice(additive.assignment)
    found = solve_quadratic(problem.problem, pairwise_model(problem, truth.factor, 1.0), [start])
    candidate = Candidate("quadratic 1", problem.assignment(found.choice))
    refined = refine(problem, [additive, candidate], truth, evaluations=0)
    assert refined.measured.mean == pytest.approx(min(found.value, truth.model.value(start)))


def test_candidates_must_be_allowed(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(5)
    truth = Truth(problem, 0)
    with pytest.raises(CompileError, match=r"must keep every limit and pin\. Got 'uniform w4'"):
        refine(problem, [Candidate("uniform w4", dict.fromkeys(problem.table.layer_names, "w4"))], truth)
    with pytest.raises(CompileError, match="at least one candidate"):
        refine(problem, [], truth)


def test_bad_measurements_are_refused(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(5)
    with pytest.raises(CompileError, match="must be finite"):
        refine(problem, [_additive(problem)], lambda plans: [Measured(float("nan"), 0.0) for _ in plans])
    with pytest.raises(CompileError, match=r"must give 1 results\. Got 0"):
        refine(problem, [_additive(problem)], lambda plans: [])
