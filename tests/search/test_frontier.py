from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from search.budget import BudgetError, parse_limits
from search.compile import Compiled, compile_problem
from search.frontier import frontier
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
    with pytest.raises(BudgetError, match="resource of the table"):
        frontier(_compiled(table, 0, []), "watts")
