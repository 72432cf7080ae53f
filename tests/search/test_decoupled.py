"""Parts with budgets of their own: the formula, and every part against every choice it could make."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest

from search.budget import parse_limits
from search.compile import Compiled, CompileError, compile_problem
from search.decoupled import RATIOS, parts_of, solve_parts, sweep
from search.problem import Problem, Solution
from search.solve import solve
from sensitivity.table_reader import parse_table

SCHEMES = ("w2", "w3", "w4", "w8")
BITS = (2, 3, 4, 8)


def compiled(layers: int = 6, limits: tuple[str, ...] = ("4 bpw",), seed: int = 0, **extra: Any) -> Compiled:
    """Layers of 40 to 400 weights; costs fall with the bits, not strictly."""
    chance = np.random.default_rng(seed)
    sizes = [int(size) * 8 for size in chance.integers(5, 50, layers)]
    values = chance.gamma(1, 1, (layers, 1)) * 4.0 ** -np.array(BITS) * chance.uniform(0.3, 3, (layers, 4))
    table = {
        "schema": "bitplan.table/1",
        "layers": [{"name": f"l{i}", "parameters": size} for i, size in enumerate(sizes)],
        "schemes": list(SCHEMES),
        "metrics": {"cost": {"direction": "min", "values": values.tolist()}},
        "resources": {
            "bytes": [[size * bits // 8 for bits in BITS] for size in sizes],
            "bops": [[size * bits * (i + 1) for bits in BITS] for i, size in enumerate(sizes)],
        },
    }
    return compile_problem(parse_table(json.dumps(table)), limits=parse_limits(limits), **extra)


def two(layers: int = 6) -> dict[str, str]:
    return {f"l{i}": "ssim" if i % 2 else "sqnr" for i in range(layers)}


def split_bits(bits: float, content: int, rest: int, ratio: float) -> tuple[float, float]:
    """Average bits of a part of `content` parameters and of the `rest`, the first `ratio` times the second.

    b_q = b (1 + r) / (k r + 1) and b_c = k b_q with r = content / rest and k = ratio, so that both together
    have `bits` on average.
    """
    r = content / rest
    quality = bits * (1 + r) / (ratio * r + 1)
    return ratio * quality, quality


def best(problem: Problem, groups: tuple[int, ...], limits: list[Fraction]) -> float | None:
    """The least cost of some groups among all their choices that keep the limits; None if none does."""
    costs = []
    for choice in product(range(len(SCHEMES)), repeat=len(groups)):
        used = [
            sum(int(row.usage[g, c]) for g, c in zip(groups, choice, strict=True)) for row in problem.rows
        ]
        if all(total <= limit for total, limit in zip(used, limits, strict=True)):
            costs.append(sum(problem.costs[g, c] for g, c in zip(groups, choice, strict=True)))
    return min(costs, default=None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", RATIOS[1:-1])
def test_each_part_is_the_best_of_all_its_choices(seed: int, ratio: float) -> None:
    """The first within the bits that the formula gives it, the rest within what the first left."""
    model = compiled(limits=("4.5 bpw",), seed=seed)
    problem, (quality, content) = model.problem, parts_of(model, two())
    choice = solve_parts(problem, [content, quality], ratio, solve)
    assert choice is not None
    assert problem.feasible(choice)
    row = problem.rows[0]
    sizes = [sum(part.parameters) for part in (content, quality)]
    bits, _ = split_bits(4.5, *sizes, ratio)
    share = row.limit * bits * sizes[0] / 4.5 / sum(sizes)
    first = best(problem, content.groups, [Fraction(int(share + 1e-6))])
    assert sum(problem.costs[g, choice[g]] for g in content.groups) == pytest.approx(first)
    used = sum(int(row.usage[g, choice[g]]) for g in content.groups)
    rest = best(problem, quality.groups, [Fraction(row.limit - used)])
    assert sum(problem.costs[g, choice[g]] for g in quality.groups) == pytest.approx(rest)


def test_every_limit_is_shared_by_what_it_counts() -> None:
    model = compiled(limits=("4 bpw", "bops<=0.4 of range"))
    found = list(sweep(model, two(), solve))
    assert len(found) > 2
    for candidate in found:
        assert model.problem.feasible(model.choice(candidate.assignment))
    shares: dict[float, list[int]] = {}

    def watching(problem: Problem) -> Solution:
        shares.setdefault(len(shares), [row.limit for row in problem.rows])
        return solve(problem)

    quality, content = parts_of(model, two())
    solve_parts(model.problem, [content, quality], 2.0, watching)
    size, bops = model.problem.rows
    sizes = [sum(part.parameters) for part in (content, quality)]
    largest = [int(bops.usage[list(part.groups)].max(axis=1).sum()) for part in (content, quality)]
    assert shares[0] == [
        int(Fraction(size.limit * 2 * sizes[0], 2 * sizes[0] + sizes[1])),
        int(Fraction(bops.limit * 2 * largest[0], 2 * largest[0] + largest[1])),
    ]


@pytest.mark.parametrize("text", ["bytes<=300", "4 bpw"])
def test_a_scoped_limit_is_shared_by_the_groups_it_covers(text: str) -> None:
    """It covers one layer of the first part and all three of the second: the first gets one layer's share."""
    few = frozenset({"l0", "l1", "l3", "l5"})
    (limit,) = parse_limits([text])
    model = compiled(limits=("7 bpw",))
    scoped = compile_problem(
        model.table, limits=[*parse_limits(["7 bpw"]), replace(limit, scope="few", layers=few)]
    )
    quality, content = parts_of(scoped, two())
    limits: list[int] = []

    def watching(problem: Problem) -> Solution:
        limits.append(problem.rows[1].limit)
        return solve(problem)

    assert solve_parts(scoped.problem, [quality, content], 1.0, watching) is not None
    size = {layer.name: layer.parameters for layer in model.table.layers}
    whole = sum(size[name] for name in few)
    assert limits[0] == int(Fraction(scoped.problem.rows[1].limit * size["l0"], whole))


def test_lower_limits_are_shared_too() -> None:
    model = compiled(limits=("bytes>=0.6 of range", "bytes<=0.8 of range"))
    found = list(sweep(model, two(), solve))
    assert found
    assert all(model.problem.feasible(model.choice(candidate.assignment)) for candidate in found)


def test_larger_ratios_give_the_first_part_more_bits() -> None:
    model = compiled(layers=8)
    plans = list(sweep(model, two(8), solve))
    assert [candidate.source.split(" x ")[0] for candidate in plans] == ["decoupled sqnr"] * len(plans)
    spent = [
        sum(
            BITS[SCHEMES.index(scheme)]
            for layer, scheme in plan.assignment.items()
            if two(8)[layer] == "sqnr"
        )
        for plan in plans
    ]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]


def test_three_parts_are_set_against_the_others_in_turn() -> None:
    decided = {f"l{i}": ("a", "b", "c")[i % 3] for i in range(6)}
    model = compiled()
    found = list(sweep(model, decided, solve, ratios=(0.7, 1.0, 1.5)))
    assert {candidate.source.split()[1] for candidate in found} == {"a", "b", "c"}
    assert len({tuple(candidate.assignment.items()) for candidate in found}) == len(found)
    for candidate in found:
        assert model.problem.feasible(model.choice(candidate.assignment))


def test_one_part_has_nothing_to_sweep() -> None:
    assert list(sweep(compiled(), dict.fromkeys(two(), "sqnr"), solve)) == []


def test_pins_hold_and_impossible_ratios_are_passed_over() -> None:
    """With the second part pinned to 8 bits, only ratios that give it as much are left."""
    model = compiled(pins={"l1": "w8", "l3": "w8", "l5": "w8"}, limits=("5.5 bpw",))
    assert [plan.source for plan in sweep(model, two(), solve, ratios=(0.25, 4.0))] == [
        "decoupled sqnr x 0.25"
    ]
    (plan,) = sweep(model, two(), solve, ratios=(0.25,))
    assert {plan.assignment[name] for name in ("l1", "l3", "l5")} == {"w8"}
    assert list(sweep(compiled(limits=("1 bpw",)), two(), solve)) == []


def test_a_tie_across_parts_is_refused() -> None:
    with pytest.raises(CompileError, match="decided by one metric. Got l0 by sqnr and l1 by ssim"):
        parts_of(compiled(ties=[["l0", "l1"]]), two())
    assert [part.groups for part in parts_of(compiled(ties=[["l0", "l2"]]), two())] == [(0, 3), (1, 2, 4)]
