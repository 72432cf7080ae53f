from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest

from search.budget import parse_limits
from search.compile import Assignment, Compiled, CompileError, compile_problem
from search.pairwise import PairwiseModel, additive_model, pairwise_model
from search.refine import LOCAL, Candidate, Measured, MeasuredSearch, refine
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
    lost, left, known = 0.0, 0.0, 0.0
    for seed in range(6):
        problem = compiled(7, seed)
        truth = Truth(problem, seed)
        candidates = [_additive(problem), _uniform(problem)]
        refined = refine(problem, candidates, truth, evaluations=40)
        screened = refine(
            problem, candidates, truth, predicted=pairwise_model(problem, truth.factor, 0.4), evaluations=12
        )
        best = _optimum(truth, problem)
        start = min(truth.model.value(problem.choice(candidate.assignment)) for candidate in candidates)
        assert best - 1e-9 <= refined.measured.mean <= start
        lost, left = lost + start / best - 1, left + refined.measured.mean / best - 1
        known += screened.measured.mean / best - 1
    assert lost > 0.5
    assert left < 0.1 * lost
    assert known < 1e-9


def _optimum(truth: Truth, compiled: Compiled) -> float:
    groups, schemes = compiled.problem.costs.shape
    choices = [c for c in product(range(schemes), repeat=groups) if compiled.problem.feasible(c)]
    return min(truth.model.value(choice) for choice in choices)


def test_what_hurts_a_half_of_the_samples_does_not_count(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(7, 0)
    start = _additive(problem)

    def measure(plans: Sequence[Assignment]) -> list[Measured]:
        """Every plan but the candidate looks much better on one half, and a little worse on the other."""
        halves = [(0.0, 0.0) if plan == start.assignment else (0.01, -1.0) for plan in plans]
        return [Measured(sum(pair) / 2, 0.01, halves=pair) for pair in halves]

    refined = refine(problem, [start], measure, evaluations=8)
    assert len(refined.trace) == 9
    assert refined.assignment == start.assignment
    assert min(step.measured.mean for step in refined.trace) < refined.measured.mean


@pytest.mark.parametrize(
    ("gain", "rival", "counts"),
    [(0.1, False, False), (0.1, True, True), (1.1, False, True), (-0.1, True, False)],
)
def test_models_win_clearly_and_rivals_by_any_difference(
    compiled: Callable[..., Compiled], gain: float, rival: bool, counts: bool
) -> None:
    problem = compiled(7, 0)
    first, other = _additive(problem), Candidate("other", _uniform(problem).assignment, rival)
    spread = np.tile([2.0, 2.0, -2.0, -2.0], 4) * np.sqrt(15 / 16)

    def measure(plans: Sequence[Assignment]) -> list[Measured]:
        rows = [np.ones(16) if plan == first.assignment else 1.0 - gain + spread for plan in plans]
        return [Measured(float(values.mean()), 0.1, values) for values in rows]

    refined = refine(problem, [first, other], measure, evaluations=0)
    assert refined.source == ("other" if counts else "additive loss")
    assert [step.accepted for step in refined.trace] == [True, counts]


@pytest.mark.parametrize(("gain", "counts"), [(0.1, False), (0.9, False), (1.1, True)])
def test_what_is_better_by_chance_does_not_count(
    compiled: Callable[..., Compiled], gain: float, counts: bool
) -> None:
    """The standard error of the paired difference is 2 / sqrt(16), so two of them are 1."""
    problem = compiled(7, 0)
    start = _additive(problem)
    spread = np.tile([2.0, 2.0, -2.0, -2.0], 4) * np.sqrt(15 / 16)

    def measure(plans: Sequence[Assignment]) -> list[Measured]:
        found = []
        for plan in plans:
            values = np.ones(16) if plan == start.assignment else 1.0 - gain + spread
            halves = (float(values[::2].mean()), float(values[1::2].mean()))
            found.append(Measured(float(values.mean()), 0.1, values, halves))
        return found

    refined = refine(problem, [start], measure, evaluations=4)
    assert (refined.assignment != start.assignment) == counts


def test_it_ends_early_when_nothing_counts(compiled: Callable[..., Compiled]) -> None:
    problem = compiled(9, 0)
    start = _additive(problem)

    def measure(plans: Sequence[Assignment]) -> list[Measured]:
        return [Measured(float(plan != start.assignment), 0.1) for plan in plans]

    assert len(refine(problem, [start], measure, evaluations=500, patience=8).trace) == 1 + 8
    assert len(refine(problem, [start], measure, evaluations=500).trace) <= 1 + 16


def test_three_way_moves_are_found(table: Build) -> None:
    """Only w3 in both l1 and l2, paid for by l0, is better: no swap of two leads there."""
    values = [[0.11, 0.1, 0.1], [0.2, 0.1, 0.1], [0.2, 0.1, 0.1]]
    built = table(values, {"bytes": [[4, 4, 8], [4, 6, 9], [4, 6, 9]]})
    problem = compile_problem(built, limits=parse_limits(["bytes<=16"]))
    start = Candidate("start", {"l0": "w4", "l1": "w2", "l2": "w2"})
    truth = {(0, 1, 1): 0.5}

    def measure(plans: Sequence[Assignment]) -> list[Measured]:
        worse = [1.0 + 0.1 * (plan != start.assignment) for plan in plans]
        return [Measured(truth.get(problem.choice(p), w), 0.1) for p, w in zip(plans, worse, strict=True)]

    found = refine(problem, [start], measure, evaluations=20)
    assert found.assignment == {"l0": "w2", "l1": "w3", "l2": "w3"}


def test_the_best_neighbor_is_tried_even_if_it_leaves_room(table: Build) -> None:
    """Swaps teach the model more, but where predictions are poor a good plan may lie next to the best one."""
    built = table([[0.01, 0.005, 0.0], [1.0, 0.5, 0.0]], {"bytes": [[4, 6, 9], [4, 6, 9]]})
    problem = compile_problem(built, limits=parse_limits(["bytes<=17"]))
    search = MeasuredSearch(
        problem, lambda plans: [Measured(1.0, 0.1) for _ in plans], additive_model(problem.problem)
    )
    search.begin([Candidate("additive loss", {"l0": "w3", "l1": "w4"})])
    found = [(source, problem.assignment(choice)) for source, choice in search.proposals()]
    assert found[:2] == [(LOCAL, {"l0": "w2", "l1": "w4"}), (LOCAL, {"l0": "w4", "l1": "w3"})]


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
    assert {step.source for step in refined.trace[2:]} == {"corrected model", "local search"}
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
