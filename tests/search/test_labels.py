from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

import search.labels
from search.core import Core, Lagrangian, core_of, lagrangian
from search.deadline import Deadline
from search.dual import solve_dual
from search.items import alike, pairs
from search.join import Join
from search.labels import Searched, _Halves, search_labels
from search.listing import Labels, Room, undominated
from search.problem import Problem, Row, Status
from search.solve import solve


@pytest.fixture
def kinds() -> Callable[..., Problem]:
    """Groups of a few kinds: equal usage within a kind, costs that differ by `noise`; `rows` limits."""

    def build(groups: int, schemes: int, rows: int, *, seed: int, noise: float = 1e-9) -> Problem:
        random = np.random.default_rng(seed)
        kind = np.arange(groups) % 3
        size = random.integers(5, 40, (3, 1))
        costs = (size * 4.0 ** -np.arange(schemes))[kind]
        costs = costs * (1 + noise * random.normal(size=costs.shape))
        usages = [(size * (2 + np.arange(schemes)))[kind]]
        usages += [np.sort(random.integers(10, 99, (3, schemes)), axis=1)[kind] for _ in range(rows - 1)]
        limits = [int(0.6 * u.min(axis=1).sum() + 0.4 * u.max(axis=1).sum()) for u in usages]
        pairs = enumerate(zip(usages, limits, strict=True))
        return Problem(costs, tuple(Row(f"r{k}", "<=", usage, limit) for k, (usage, limit) in pairs))

    return build


@pytest.mark.parametrize("noise", [0.0, 1e-9, 0.1])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tables_of_few_kinds_equal_brute_force(
    kinds: Callable[..., Problem], rows: int, noise: float
) -> None:
    for seed in range(4):
        problem = kinds(12, 2, rows, seed=seed, noise=noise)
        truth, found = solve(problem, solver="brute"), solve(problem)
        assert found.status == truth.status
        if truth.objective is not None:
            assert found.objective == pytest.approx(truth.objective, rel=1e-12)


@pytest.mark.parametrize("schemes", [2, 3])
@pytest.mark.parametrize("rows", [2, 3])
def test_listing_groups_together_changes_no_optimum(
    kinds: Callable[..., Problem], schemes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = kinds(24, schemes, rows, seed=rows)
    together = solve(problem)
    monkeypatch.setattr(search.labels, "MANY", 10**9)
    alone = solve(problem)
    assert together.status is alone.status is Status.OPTIMAL
    assert together.objective == pytest.approx(alone.objective, rel=2e-9)


def test_near_ties_under_two_limits_are_proven(kinds: Callable[..., Problem]) -> None:
    solution = solve(kinds(240, 4, 2, seed=1))
    assert solution.status is Status.OPTIMAL
    assert solution.method in ("dual", "labels")


def _core(problem: Problem) -> tuple[Core, Lagrangian]:
    core = core_of(problem)
    return core, lagrangian(core, solve_dual(core, Deadline()).multipliers)


def test_a_search_cut_short_says_what_it_has_proven(kinds: Callable[..., Problem]) -> None:
    core, bound = _core(kinds(60, 3, 2, seed=5))
    whole = search_labels(core, bound, None, Deadline())
    short = search_labels(core, bound, None, Deadline(), most=16)
    assert whole.complete
    assert whole.choice is not None
    assert not short.complete
    assert 0 <= short.done <= bound.excess(core, whole.choice)
    if short.choice is not None:
        assert core.feasible(short.choice)
        assert core.total(short.choice) >= core.total(whole.choice) - whole.slip


def test_a_search_out_of_time_between_thresholds_proves_nothing(
    kinds: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, bound = _core(kinds(60, 3, 2, seed=5))
    monkeypatch.setattr(_Halves, "_run", lambda self, threshold, deadline: Searched(True, None))
    found = search_labels(core, bound, None, Deadline(0.0))
    assert found.choice is None
    assert not found.complete
    assert search_labels(core, bound, None, Deadline()).complete


def test_groups_are_alike_by_their_usage_up_to_a_constant() -> None:
    usage = [np.array([[1, 3], [5, 7], [1, 4], [0, 2]]), np.array([[2, 2], [0, 0], [2, 2], [9, 9]])]
    assert [each.tolist() for each in alike(usage, np.arange(4))] == [[0, 1, 3], [2]]
    assert [each.tolist() for each in alike(usage, np.array([2, 3, 1]))] == [[2], [3, 1]]
    large = [np.array([[2**70, 2**70 + 1], [0, 1]], dtype=object)]
    assert [each.tolist() for each in alike(large, np.arange(2))] == [[0, 1]]


def test_a_count_of_changes_is_the_cheapest_of_its_size() -> None:
    reduced = np.array([[0.0, 3.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    item = pairs((5, 7), np.arange(10, 15), reduced, np.array([6]), 100.0)
    base = np.where(reduced[:, 0] <= reduced[:, 1], 0, 1)
    seen = {}
    for cell, (cost, used) in enumerate(zip(item.reduced, item.usage[:, 0], strict=True)):
        side = base.copy()
        for group, scheme in item.chosen(cell).items():
            side[group - 10] = {5: 0, 7: 1}[scheme]
        assert reduced[np.arange(5), side].sum() == cost
        assert 6 * (side.sum() - base.sum()) == used
        seen[int(side.sum())] = cost
    for count in range(6):
        costs = [sum(reduced[g, int(g in ones)] for g in range(5)) for ones in combinations(range(5), count)]
        assert seen[count] == min(costs)
    assert len(pairs((5, 7), np.arange(5), reduced, np.array([6]), 1.5).reduced) == 3


def _labels(random: np.random.Generator, rows: int, count: int) -> Labels:
    usage = random.integers(-60, 60, (count, rows))
    return Labels((), random.uniform(0, 1, count), usage, (), True)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_joined_pairs_are_the_cheapest_within_the_limits(rows: int) -> None:
    random = np.random.default_rng(rows)
    for _ in range(20):
        first, second = _labels(random, rows, 90), _labels(random, rows, 110)
        price = random.choice([0.0, 0.02, 0.3], rows)
        left = random.integers(-100, 40, rows)
        room = Room(left, price, 1.2)
        sums = {
            (a, b): first.reduced[a] + second.reduced[b] + (left - first.usage[a] - second.usage[b]) @ price
            for a, b in product(range(90), range(110))
            if (first.usage[a] + second.usage[b] <= left).all()
        }
        least = min(sums.values(), default=2.0)
        found, complete = Join(room, 1e-12, first, second).best(Deadline())
        assert complete
        assert bool(found) == (least <= 1.2)
        assert all(sums[pair] == pytest.approx(least) for pair in found)


def test_labels_are_left_out_only_for_better_ones() -> None:
    random = np.random.default_rng(0)
    excess, used = random.uniform(0, 1, 6000), random.integers(0, 40, (6000, 2))
    price = np.array([0.01, 0.02])
    kept = undominated(excess, used, price)
    value = excess - used @ price
    assert len(kept) < 2000
    for label in range(0, 6000, 7):
        better = (used[kept] <= used[label]).all(axis=1) & (value[kept] <= value[label])
        assert better.any()


def test_slip_counts_in_the_bound(kinds: Callable[..., Problem]) -> None:
    core, bound = _core(kinds(30, 2, 2, seed=2, noise=0.3))
    found = search_labels(core, bound, None, Deadline(), gap=1e-3)
    assert found.choice is not None
    assert Fraction(0) <= found.slip <= Fraction(1, 1000) * abs(core.total(found.choice))
