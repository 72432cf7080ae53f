from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from search.budget import parse_limits
from search.explain import explain
from search.problem import Problem
from search.question import Question, Restriction, ungrouped
from search.rate_distortion import rate_distortion, water_filling
from search.solve import solve
from search.stability import stability
from sensitivity.table import MetricTable, ScoreTable

Build = Callable[..., ScoreTable]


def _table(table: Build, seed: int, *, layers: int = 4, direction: str = "min") -> ScoreTable:
    rng = np.random.default_rng(seed)
    sign = 1 if direction == "min" else -1
    values = (sign * np.sort(rng.uniform(0, 1, (layers, 3)), axis=1)[:, ::-1]).tolist()
    sizes = np.sort(rng.integers(1, 50, (layers, 3)), axis=1).tolist()
    times = rng.integers(1, 50, (layers, 3)).tolist()
    return table(values, {"bytes": sizes, "latency_ns": times}, direction=direction)


def _best(question: Question, without: tuple[Restriction, ...] = (), fixed: tuple[int, int] | None = None):
    """The best objective by enumeration, with a group fixed to a scheme if asked; infinite if nothing fits."""
    problem = question.compiled(without).problem
    sign = 1 if problem.direction == "min" else -1
    every = product(range(problem.costs.shape[1]), repeat=len(problem.costs))
    kept = (c for c in every if fixed is None or c[fixed[0]] == fixed[1])
    return sign * min((sign * problem.objective(c) for c in kept if problem.feasible(c)), default=np.inf)


QUESTIONS = [
    (["bytes<=50% of range"], "min"),
    (["bytes<=60% of range", "latency<=100 ns"], "min"),
    (["bytes<=40% of range"], "max"),
]


@pytest.mark.parametrize(("limits", "direction"), QUESTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_steps_and_margins_are_what_enumeration_says(
    table: Build, seed: int, limits: list[str], direction: str
) -> None:
    question = Question(_table(table, seed, direction=direction), limits=parse_limits(limits))
    compiled = question.compiled()
    solution = solve(compiled.problem, prices=True)
    found = explain(question, solution, draws=0)
    sign = 1 if direction == "min" else -1
    assert found.optimum == found.objective == pytest.approx(_best(question))
    assert len(found.decisions) == len(compiled.groups)
    for group, decision in enumerate(found.decisions):
        chosen = question.table.schemes.index(decision.scheme)
        assert chosen == solution.choice[group]
        for step, cell in ((decision.up, chosen + 1), (decision.down, chosen - 1)):
            assert (step is not None) == (0 <= cell < 3)
            if step is not None:
                used = question.table.resources["latency_ns"][group]
                assert step.scheme == question.table.schemes[cell]
                assert (
                    step.loss == compiled.problem.costs[group, cell] - compiled.problem.costs[group, chosen]
                )
                assert step.resources["latency_ns"] == used[cell] - used[chosen]
        worse = {
            cell: sign * (_best(question, fixed=(group, cell)) - found.optimum)
            for cell in range(3)
            if cell != chosen
        }
        for cell, regret in worse.items():
            assert regret >= _reduced(compiled.problem, found.prices, group, cell) - found.excess - 1e-9
        alternative = question.table.schemes.index(decision.alternative)
        reduced = [_reduced(compiled.problem, found.prices, group, cell) for cell in range(3)]
        assert alternative == min(worse, key=lambda cell: reduced[cell])
        assert decision.margin == pytest.approx(reduced[alternative] - reduced[chosen])


def _reduced(problem: Problem, prices, group: int, cell: int) -> float:
    """Cost plus usage at the prices, less the group's least: all limits of these problems are "at most"."""
    sign = 1 if problem.direction == "min" else -1
    priced = sign * problem.costs[group] + sum(prices[r.resource] * r.usage[group] for r in problem.rows)
    return float(priced[cell] - priced.min())


def test_each_tie_pin_and_rule_is_priced_by_leaving_it_out(table: Build) -> None:
    grouped, groups = ungrouped(
        table(
            [[0.9, 0.1, 0.0], [0.3, 0.25, 0.2], [0.4, 0.3, 0.0], [0.6, 0.5, 0.0]],
            {"bytes": [[1, 2, 4], [1, 2, 4], [3, 6, 12], [1, 2, 4]]},
            groups={0: "qk", 1: "qk"},
        )
    )
    restrictions = (
        *groups,
        Restriction("pin", "l2=w3", pins={"l2": "w3"}),
        Restriction("rule", "no w4 in l3", forbidden={"l3": ("w4",)}, unscored=1),
    )
    question = Question(grouped, limits=parse_limits(["bytes<=13"]), restrictions=restrictions)
    found = explain(question, solve(question.compiled().problem, prices=True))
    assert [one.name for one in found.reliefs] == ["group qk", "l2=w3", "no w4 in l3", "all together"]
    for relief, left_out in zip(
        found.reliefs, [*((one,) for one in restrictions), restrictions], strict=True
    ):
        assert relief.objective == pytest.approx(_best(question, left_out))
        assert relief.share == pytest.approx(1 - relief.objective / found.optimum)
    assert found.reliefs[-1].share > max(one.share for one in found.reliefs[:-1])
    assert [one.unscored for one in found.reliefs] == [0, 0, 1, 1]
    assert found.decisions[0].layers == ("l0", "l1")
    pinned = found.decisions[1]
    assert (pinned.scheme, pinned.up, pinned.margin, pinned.stability) == ("w3", None, None, None)


def test_a_plan_that_was_measured_better_is_explained_as_it_is(table: Build) -> None:
    question = Question(_table(table, 1), limits=parse_limits(["bytes<=50% of range"]))
    compiled = question.compiled()
    solution = solve(compiled.problem, prices=True)
    other = dict(compiled.assignment(solution.choice), l0="w2", l1="w2")
    found = explain(question, solution, other)
    assert found.objective == compiled.objective(other) > found.optimum
    assert [one.scheme for one in found.decisions][:2] == ["w2", "w2"]
    assert found.excess >= found.objective - found.optimum - 1e-12


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_stability_is_near_that_of_exact_solves_of_the_same_draws(
    knapsack: Callable[..., Problem], rows: int
) -> None:
    problem = knapsack(12, 4, max(rows, 1), seed=3)
    problem = replace(problem, rows=problem.rows[:rows])
    plan, stderr, draws = solve(problem).choice, 0.3 * problem.costs, 25
    errors = np.random.default_rng(7).standard_normal((draws, *problem.costs.shape)) * stderr
    exact = [solve(replace(problem, costs=problem.costs + error)).choice for error in errors]
    naive = (np.array(exact) == np.array(plan)).mean(axis=0)
    found = stability(problem, stderr, plan, draws, seed=7)
    assert np.abs(found - naive).mean() <= (0.04 if rows else 0.0)
    assert np.corrcoef(found, naive)[0, 1] > 0.9
    assert (stability(problem, 0 * stderr, plan, 3) == 1).all()
    assert (stability(problem, stderr, plan, draws, seed=7) == found).all()


def test_stability_needs_standard_errors_and_keeps_limits(table: Build) -> None:
    plain = _table(table, 2)
    metric = plain.metrics["loss"]
    question = Question(plain, limits=parse_limits(["bytes<=50% of range"]))
    solution = solve(question.compiled().problem, prices=True)
    assert explain(question, solution).draws == 0
    noisy = replace(plain, metrics={"loss": MetricTable("min", metric.values, np.full((4, 3), 100.0))})
    found = explain(replace(question, table=noisy), solution, draws=300)
    assert found.draws == 300
    assert all(0 < one.stability < 1 for one in found.decisions)


def test_the_reference_is_the_least_loss_of_the_law_at_the_plans_bits(table: Build) -> None:
    losses = np.array([8.0, 1.0, 0.02])
    values = [[a * 4.0**-bits for bits in (2, 3, 4)] for a in losses]
    built = table(values, {"bytes": [[2, 3, 4]] * 3})
    found = rate_distortion(built, "loss", {"l0": "w4", "l1": "w3", "l2": "w2"})
    assert found.bits_per_weight == 3
    assert found.plan == pytest.approx(values[0][2] + values[1][1] + values[2][0])
    assert found.objective == pytest.approx(
        sum(a * 4.0**-b for a, b in zip(losses, found.bits.values(), strict=True))
    )
    rng = np.random.default_rng(0)
    tries = rng.dirichlet(np.ones(3), 3000) * 9
    assert found.objective <= (losses * 4.0**-tries).sum(axis=1).min() <= found.objective * 1.05
    assert sum(found.bits.values()) == pytest.approx(9)
    assert min(found.bits.values()) >= 0
    none = table([[-1.0, -2.0]], {"bytes": [[1, 2]]}, direction="max")
    assert rate_distortion(none, "loss", {"l0": "w2"}) is None


def test_water_filling_leaves_hopeless_layers_dry() -> None:
    widths = water_filling(np.array([1.0, 1e-9, 16.0]), np.array([1.0, 1.0, 2.0]), 3.0)
    assert widths[1] == 0
    assert widths @ [1, 1, 2] == pytest.approx(3)
    assert 16 / 2 * 4.0 ** -widths[2] == pytest.approx(4.0 ** -widths[0])
