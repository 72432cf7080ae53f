from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from search.budget import BudgetError, parse_limits
from search.compile import Compiled, compile_problem
from search.frontier import between, frontier
from sensitivity.table import ScoreTable

Build = Callable[..., ScoreTable]


def _compiled(
    table: Build, seed: int, limits: list[str], layers: int = 5, direction: str = "min"
) -> Compiled:
    rng = np.random.default_rng(seed)
    sign = 1 if direction == "min" else -1
    values = (sign * np.sort(rng.uniform(0, 1, (layers, 3)), axis=1)[:, ::-1]).tolist()
    sizes = np.sort(rng.integers(1, 50, (layers, 3)), axis=1).tolist()
    times = rng.integers(1, 50, (layers, 3)).tolist()
    built = table(values, {"bytes": sizes, "latency_ns": times}, direction=direction)
    return compile_problem(built, limits=parse_limits(limits))


def _supported(compiled: Compiled, latency: int | None) -> list[tuple[int, float]]:
    """Corners of the lower convex hull of every feasible plan, by brute force."""
    sign = 1 if compiled.problem.direction == "min" else -1
    points: dict[int, float] = {}
    for choice in product(range(3), repeat=len(compiled.groups)):
        totals = compiled.resources(compiled.assignment(choice))
        if latency is None or totals["latency_ns"] <= latency:
            cost = sign * compiled.problem.objective(choice)
            points[int(totals["bytes"])] = min(cost, points.get(int(totals["bytes"]), np.inf))
    hull: list[tuple[int, float]] = []
    for used, cost in sorted(points.items()):
        if hull and cost >= hull[-1][1] - 1e-12:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (used, cost)) - 1e-12:
            hull.pop()
        hull.append((used, cost))
    return [(used, sign * cost) for used, cost in hull]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("latency", [None, 110])
@pytest.mark.parametrize("seed", range(4))
def test_every_supported_plan_is_there(table: Build, seed: int, latency: int | None, direction: str) -> None:
    limits = [] if latency is None else [f"latency_ns<={latency}"]
    compiled = _compiled(table, seed, limits, direction=direction)
    found = {int(point.used): point.objective for point in frontier(compiled, "bytes")}
    for used, objective in _supported(compiled, latency):
        assert found[used] == pytest.approx(objective)
    costs = [found[used] for used in sorted(found)]
    assert costs == sorted(costs, reverse=direction == "min")


def test_limits_on_the_resource_itself_are_ignored(table: Build) -> None:
    assert [p.used for p in frontier(_compiled(table, 0, []), "bytes")] == [
        p.used for p in frontier(_compiled(table, 0, ["bytes<=60"]), "bytes")
    ]


def test_long_frontiers_are_thinned_and_keep_their_ends(table: Build) -> None:
    compiled = _compiled(table, 1, [], layers=60)
    whole, few = frontier(compiled, "bytes", most=10_000), frontier(compiled, "bytes", most=7)
    assert len(few) == 7
    assert (few[0], few[-1]) == (whole[0], whole[-1])
    assert set(few) <= set(whole)


def test_bits_per_weight_scales_bytes(table: Build) -> None:
    compiled = _compiled(table, 2, [])
    weights = compiled.table.parameters
    by_bytes, by_bits = frontier(compiled, "bytes"), frontier(compiled, "bits_per_weight")
    assert [p.used for p in by_bits] == [Fraction(8 * p.used, weights) for p in by_bytes]


def test_nothing_where_nothing_fits(table: Build) -> None:
    assert frontier(_compiled(table, 0, ["latency_ns<=1"]), "bytes") == ()
    with pytest.raises(BudgetError, match="of the table"):
        frontier(_compiled(table, 0, []), "watts")


def _every_point(compiled: Compiled, latency: int | None) -> dict[int, float]:
    """Total -> objective of every plan that no other beats in both, by enumeration."""
    sign = 1 if compiled.problem.direction == "min" else -1
    best: dict[int, float] = {}
    for choice in product(range(3), repeat=len(compiled.groups)):
        totals = compiled.resources(compiled.assignment(choice))
        if latency is None or totals["latency_ns"] <= latency:
            used, cost = int(totals["bytes"]), sign * compiled.problem.objective(choice)
            best[used] = min(cost, best.get(used, np.inf))
    kept: dict[int, float] = {}
    for used, cost in sorted(best.items()):
        if not kept or cost < min(kept.values()):
            kept[used] = cost
    return {used: sign * cost for used, cost in kept.items()}


@pytest.mark.parametrize(("latency", "direction"), [(None, "min"), (110, "min"), (None, "max")])
def test_between_two_totals_every_plan_is_there_and_proven(
    table: Build, latency: int | None, direction: str
) -> None:
    limits = [] if latency is None else [f"latency_ns<={latency}"]
    compiled = _compiled(table, 3, limits, layers=4, direction=direction)
    every = _every_point(compiled, latency)
    low, high = sorted(every)[1], sorted(every)[-2]
    found = between(compiled, "bytes", Fraction(low), Fraction(high))
    assert found.rest is None
    assert {int(p.used): p.objective for p in found.points} == pytest.approx(
        {used: value for used, value in every.items() if low <= used <= high}
    )
    assert {(point.gap, point.price) for point in found.points} == {(0.0, None)}
    upper = between(compiled, "bytes", Fraction(low), Fraction(high), most=2)
    assert upper.points == found.points[-2:]
    assert upper.rest is not None
    lower = between(compiled, "bytes", *upper.rest)
    assert lower.points + upper.points == found.points
    assert between(compiled, "bytes", Fraction(low), Fraction(low, 2)).points == ()


def test_of_equal_plans_between_totals_the_smaller_stays(table: Build) -> None:
    compiled = compile_problem(
        table([[1.0, 0.5, 0.5], [0.25, 0.25, 0.125]], {"bytes": [[1, 2, 3], [1, 2, 4]]})
    )
    found = between(compiled, "bytes", Fraction(1), Fraction(9))
    assert [(int(p.used), p.objective) for p in found.points] == [(2, 1.25), (3, 0.75), (6, 0.625)]
    inside = between(compiled, "bytes", Fraction(4), Fraction(5))
    assert (inside.points, inside.rest) == ((), None)


@pytest.mark.parametrize("latency", [None, 110])
@pytest.mark.parametrize("direction", ["min", "max"])
def test_the_certificate_of_a_supported_plan_holds(table: Build, direction: str, latency: int | None) -> None:
    limits = [] if latency is None else [f"latency_ns<={latency}"]
    compiled = _compiled(table, 1, limits, layers=4, direction=direction)
    every = _every_point(compiled, latency)
    sign = 1 if direction == "min" else -1
    for point in frontier(compiled, "bytes"):
        least = min(sign * value for used, value in every.items() if used <= point.used)
        assert sign * point.bound <= least + 1e-12
        assert point.gap <= 1e-9
        if point.price is not None:
            priced = {used: sign * value + point.price * used for used, value in every.items()}
            assert priced[int(point.used)] <= min(priced.values()) + 1e-9
