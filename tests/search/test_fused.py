"""Fused candidates: each layer covered exactly once, by its own scheme or by one candidate."""

from __future__ import annotations

import json
import random
from itertools import chain, combinations, product
from typing import Any

import numpy as np
import pytest

from search import compile as compiling
from search import covers
from search.backends import pulp
from search.budget import parse_limits
from search.catalog import SOLVERS
from search.compile import CompileError, compile_problem
from search.conflict import conflict_of
from search.decoupled import parts_of
from search.explain import explain
from search.objectives.catalog import parse_objective, solve_objective
from search.objectives.objective import ObjectiveError
from search.pairwise import pairwise_model
from search.problem import Problem, Status
from search.question import Question, Restriction
from search.refine import Candidate, refine
from search.solve import solve
from search.stability import stability
from sensitivity.table import ScoreTable
from sensitivity.table_reader import parse_table

QKV = {"layers": ["q", "k", "v"], "scheme": "w4", "resources": {"latency_ns": 14}}
DOCUMENT: dict[str, Any] = {
    "schema": "bitplan.table/1",
    "layers": [{"name": name, "parameters": 8} for name in ("q", "k", "v", "up")],
    "schemes": ["w2", "w4", "w8"],
    "metrics": {"loss": {"direction": "min", "values": [[9, 3, 0], [8, 2, 0], [7, 1, 0], [6, 2, 0]]}},
    "resources": {"bytes": [[2, 4, 8]] * 4, "latency_ns": [[8, 10, 12]] * 4},
}


def _table(*fused: dict[str, Any], **changes: Any) -> ScoreTable:
    return parse_table(json.dumps(DOCUMENT | changes | {"fused": list(fused)}))


def _answer(table: ScoreTable, *limits: str, **asked: Any) -> tuple[list[str], list[list[str]], float]:
    compiled = compile_problem(table, limits=parse_limits(limits), **asked)
    solution = solve(compiled.problem)
    assert (solution.status, solution.choice is not None) == (Status.OPTIMAL, True)
    plan, fused = compiled.assignment(solution.choice), compiled.fused(solution.choice)
    resources = compiled.resources(plan, fused)
    for row in compiled.problem.rows:
        if row.resource in resources:
            assert resources[row.resource] == row.total(solution.choice) * row.unit
    return list(plan.values()), [list(one.layers) for one in fused], compiled.objective(plan, fused)


def test_a_candidate_replaces_the_cells_of_its_layers() -> None:
    assert _answer(_table(), "latency_ns<=32") == (["w2"] * 4, [], 30.0)
    assert _answer(_table(QKV), "latency_ns<=26") == (["w4", "w4", "w4", "w8"], [["q", "k", "v"]], 6.0)
    own = QKV | {"metrics": {"loss": 4.5}, "resources": {"latency_ns": 14, "bytes": 11}}
    assert _answer(_table(own), "latency_ns<=26", "bytes<=19")[2] == 4.5
    assert _answer(_table(own), "bytes<=15") == (["w4"] * 4, [["q", "k", "v"]], 6.5)


def test_without_room_to_gain_nothing_is_fused() -> None:
    assert _answer(_table(QKV), "bytes<=32") == (["w8"] * 4, [], 0.0)
    worthless = {"layers": ["q", "k"], "scheme": "w8"}
    assert _answer(_table(worthless), "bytes<=32") == (["w8"] * 4, [], 0.0)


def test_pins_ties_forbidden_schemes_and_menus_hold_for_candidates() -> None:
    limit = "latency_ns<=40"
    assert _answer(_table(QKV), limit, pins={"k": "w2"})[:2] == (["w8", "w2", "w4", "w4"], [])
    assert _answer(_table(QKV), limit, pins={"k": "w4"})[1] == [["q", "k", "v"]]
    assert _answer(_table(QKV), limit, forbidden={"v": ["w4"]})[1] == []
    assert _answer(_table(QKV), limit, schemes=["w2", "w8"])[1] == []
    assert _answer(_table(QKV), limit, ties=[("v", "up")])[:2] == (["w4"] * 4, [["q", "k", "v"]])
    assert _answer(_table(QKV), limit, ties=[("q", "k", "v")])[1] == [["q", "k", "v"]]
    pair = {"layers": ["q", "k"], "scheme": "w4", "resources": {"latency_ns": 3}}
    assert _answer(_table(pair), "latency_ns<=25", ties=[("q", "v")]) == (
        ["w4", "w4", "w4", "w8"],
        [["q", "k"]],
        6.0,
    )


def test_a_layer_may_be_offered_a_scheme_by_a_candidate_alone() -> None:
    values = [[9, None, 0], *DOCUMENT["metrics"]["loss"]["values"][1:]]
    metrics = {"loss": {"direction": "min", "values": values}}
    table = _table(QKV | {"metrics": {"loss": 5}}, metrics=metrics)
    assert _answer(table, pins={"q": "w4"}) == (["w4", "w4", "w4", "w8"], [["q", "k", "v"]], 5.0)
    with pytest.raises(CompileError, match=r"pinned for q must be offered there. Got w4. Offered: w2, w8"):
        _answer(table, pins={"q": "w4"}, forbidden={"q": ["w4"]})
    with pytest.raises(CompileError, match=r"pinned for q must be offered there. Got w4. Offered: w2, w8"):
        _answer(_table(metrics=metrics), pins={"q": "w4"})
    nothing = compile_problem(table, pins={"q": "w4"}, forbidden={"v": ["w4"]})
    found = solve(nothing.problem)
    assert (found.status, found.reason[:26]) == (Status.INFEASIBLE, "no scheme is left for q: i")


def test_a_number_of_its_own_counts_whole_in_every_cut_that_it_touches() -> None:
    maxima = {"peak": {"resource": "bytes", "cuts": [["q", "k"], ["v", "up"]]}}
    pins = {"q": "w4", "k": "w4", "v": "w4", "up": "w8"}
    for candidate, peak, total in ((QKV, 12, 20), (QKV | {"resources": {"bytes": 9}}, 17, 17)):
        table = _table(candidate, maxima=maxima)
        compiled = compile_problem(
            table, pins=pins, limits=parse_limits([f"peak<={peak}", f"bytes<={total}"])
        )
        solution = solve(compiled.problem)
        assert solution.choice is not None
        used = compiled.resources(compiled.assignment(solution.choice), table.fused)
        assert (used["peak"], used["bytes"]) == (peak, total)
        tight = compile_problem(
            table, pins=pins, limits=parse_limits([f"peak<={peak - 1}", f"bytes<={total}"])
        )
        assert solve(tight.problem).status is Status.INFEASIBLE
    assert compiled.fused(solution.choice) == table.fused


def _random(seed: int, layers: int) -> tuple[ScoreTable, list[tuple[str, ...]], dict[str, str], list[str]]:
    """A larger table: fused pairs and triples of neighbors, ties, pins, two limits, scores of both signs."""
    rng = random.Random(seed)
    schemes = rng.randint(2, 4)
    names = [f"l{i}" for i in range(layers)]

    def rows(draw: Any) -> list[list[Any]]:
        return [[draw() for _ in range(schemes)] for _ in names]

    values = rows(lambda: rng.uniform(-1, 5))
    used = {name: rows(lambda: rng.randint(1, 60)) for name in ("a", "b")}
    fused = []
    for start in range(0, layers - 3, 4):
        for _ in range(rng.randint(1, 4)):
            inside = sorted(rng.sample(range(start, start + 4), rng.choice([2, 3])))
            column = rng.randrange(schemes)
            total = {name: sum(used[name][i][column] for i in inside) for name in used}
            one: dict[str, Any] = {"layers": [names[i] for i in inside], "scheme": f"s{column}"}
            if rng.random() < 0.7:
                one["resources"] = {"b": int(total["b"] * rng.uniform(0.4, 0.9)) + 0.5}
            if rng.random() < 0.5:
                one["metrics"] = {"m": sum(values[i][column] for i in inside) + rng.uniform(-0.5, 1)}
            fused.append(one)
    document = {
        "schema": "bitplan.table/1",
        "layers": [{"name": name, "parameters": 8} for name in names],
        "schemes": [f"s{c}" for c in range(schemes)],
        "metrics": {"m": {"direction": rng.choice(["min", "max"]), "values": values}},
        "resources": used,
        "fused": fused,
    }
    ties = [tuple(rng.sample(names, 2)) for _ in range(2)]
    pins = {names[-1]: "s0"}
    limits = [
        f"{name}<={int(sum(map(min, cells)) + 0.45 * (sum(map(max, cells)) - sum(map(min, cells))))}"
        for name, cells in used.items()
    ]
    limits.append(f"a>={int(0.3 * sum(map(max, used['a'])))}")
    return parse_table(json.dumps(document)), ties, pins, limits


def _by_pulp(table: ScoreTable, ties: Any, pins: Any, limits: list[str]) -> float | None:
    """The set-partitioning program as its definition says it."""
    metric = table.metrics["m"]
    sense = pulp.LpMinimize if metric.direction == "min" else pulp.LpMaximize
    program = pulp.LpProblem("reference", sense)
    own = {
        (i, c): program.add_variable(f"x_{i}_{c}", 0, 1, "Integer")
        for i in range(len(table.layers))
        for c in range(len(table.schemes))
    }
    taken = [program.add_variable(f"y_{i}", 0, 1, "Integer") for i in range(len(table.fused))]

    def gets(layer: str, scheme: str) -> Any:
        alone = own[table.layer_names.index(layer), table.schemes.index(scheme)]
        pairs = zip(taken, table.fused, strict=True)
        return alone + pulp.lpSum([y for y, f in pairs if layer in f.layers and scheme == f.scheme])

    for layer in table.layer_names:
        program += pulp.lpSum([gets(layer, scheme) for scheme in table.schemes]) == 1
    for first, second in ties:
        for scheme in table.schemes:
            program += gets(first, scheme) - gets(second, scheme) == 0
    for layer, scheme in pins.items():
        program += gets(layer, scheme) == 1

    def total(stated: list[float | None], cells: Any) -> Any:
        numbers = [
            sum(cells[table.layer_names.index(n)][table.schemes.index(f.scheme)] for n in f.layers)
            if number is None
            else number
            for number, f in zip(stated, table.fused, strict=True)
        ]
        alone = [float(cells[i][c]) * x for (i, c), x in own.items()]
        return pulp.lpSum([*alone, *(float(n) * y for n, y in zip(numbers, taken, strict=True))])

    for limit in parse_limits(limits):
        stated = [
            None if limit.resource not in f.resources else float(f.resources[limit.resource])
            for f in table.fused
        ]
        left = total(stated, table.resources[limit.resource])
        program += left <= float(limit.value) if limit.relation == "<=" else left >= float(limit.value)
    program += total([f.metrics.get("m") for f in table.fused], metric.values.tolist())
    status = program.solve(pulp.HiGHS(msg=False, gapRel=0, gapAbs=0))
    return float(pulp.value(program.objective)) if pulp.LpStatus[status] == "Optimal" else None


def _check_against_pulp(seeds: range, layers: int) -> None:
    fused = 0
    for seed in seeds:
        table, ties, pins, limits = _random(seed, layers)
        compiled = compile_problem(table, limits=parse_limits(limits), ties=ties, pins=pins)
        solution, reference = solve(compiled.problem), _by_pulp(table, ties, pins, limits)
        if reference is None:
            assert solution.status is Status.INFEASIBLE, seed
            continue
        assert solution.status is Status.OPTIMAL, seed
        assert solution.choice is not None
        assert solution.objective == pytest.approx(reference, rel=1e-6, abs=1e-6), seed
        fused += len(compiled.fused(solution.choice))
    assert fused > len(seeds)


def test_larger_tables_agree_with_the_set_partitioning_program() -> None:
    _check_against_pulp(range(6), 24)


@pytest.mark.slow
def test_many_larger_tables_agree_with_the_set_partitioning_program() -> None:
    _check_against_pulp(range(6, 60), 40)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gives_the_same_plan_value(solver: str) -> None:
    layers = 5 if solver == "brute" else 16
    solved = 0
    for seed in range(6):
        table, ties, pins, limits = _random(seed, layers)
        problem = compile_problem(table, limits=parse_limits(limits), ties=ties, pins=pins).problem
        mine, other = solve(problem), solve(problem, solver=solver)
        assert mine.status == other.status
        if mine.objective is not None:
            assert mine.objective == pytest.approx(other.objective, rel=1e-9)
            solved += 1
    assert solved > 2


def _two_metrics(seed: int) -> ScoreTable:
    """Four layers and two or three candidates, which state each number or not."""
    rng = random.Random(seed)

    def rows(most: float) -> list[list[float]]:
        return [[rng.uniform(0, most) for _ in range(3)] for _ in range(4)]

    metrics = {name: {"direction": "min", "values": rows(9), "stderr": rows(1)} for name in ("loss", "other")}
    fused = []
    for _ in range(rng.choice([2, 3])):
        stated = [name for name in metrics if rng.random() < 0.6]
        fused.append(
            {
                "layers": rng.sample(["q", "k", "v", "up"], rng.choice([2, 3])),
                "scheme": rng.choice(["w2", "w4", "w8"]),
                "metrics": {name: rng.uniform(2, 12) for name in stated},
                "stderr": {name: rng.uniform(0, 1) for name in stated},
                "resources": {"latency_ns": rng.randint(10, 24)},
            }
        )
    return _table(*fused, metrics=metrics)


def _every_plan(table: ScoreTable, name: str, member: str = "metrics") -> dict[tuple[Any, ...], float]:
    """A number of every plan of four layers, from the definition: schemes and candidates -> total."""
    cells = table.resources[name] if member == "resources" else table.metrics[name].values
    if member == "stderr":
        cells = table.metrics[name].stderr
    found = {}
    for schemes in product(range(3), repeat=4):
        for used in chain(*(combinations(range(len(table.fused)), size) for size in range(3))):
            picked = [table.fused[i] for i in used]
            covered = [name for one in picked for name in one.layers]
            agree = all(
                table.schemes[schemes[table.layer_names.index(layer)]] == one.scheme
                for one in picked
                for layer in one.layers
            )
            if not agree or len(set(covered)) < len(covered):
                continue
            stated = [
                one for one in picked if name in (one.metrics if member == "stderr" else vars(one)[member])
            ]
            apart = {layer for one in stated for layer in one.layers}
            own = [cells[i][c] for i, c in enumerate(schemes) if table.layer_names[i] not in apart]
            found[schemes, used] = float(sum(own) + sum(vars(one)[member][name] for one in stated))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "weighted: loss=1, other=0.5",
        "weighted_normalized: loss=1, other=2",
        "lexicographic: other within 20%, loss",
        "uncertainty: 2",
        "worst: loss, other",
    ],
)
def test_objectives_over_candidates_equal_every_plan_tried(text: str) -> None:
    fused = 0
    for seed in range(12):
        table = _two_metrics(seed)
        compiled = compile_problem(table, metric="loss", limits=parse_limits(["latency_ns<=34"]))
        solution = solve_objective(compiled, parse_objective(text)).solution
        latency = _every_plan(table, "latency_ns", "resources")
        loss, other = _every_plan(table, "loss"), _every_plan(table, "other")
        error = _every_plan(table, "loss", "stderr")
        span = {id(one): max(one.values()) - min(one.values()) for one in (loss, other)}
        values = {
            "weighted": {plan: loss[plan] + other[plan] / 2 for plan in loss},
            "weighted_normalized": {
                plan: loss[plan] / span[id(loss)] + 2 * other[plan] / span[id(other)] for plan in loss
            },
            "uncertainty": {plan: loss[plan] + 2 * error[plan] for plan in loss},
            "worst": {plan: max(loss[plan], other[plan]) for plan in loss},
            "lexicographic": loss,
        }[text.partition(":")[0]]
        plans = [plan for plan in loss if latency[plan] <= 34]
        if text.startswith("lexicographic"):
            least = min(other[plan] for plan in plans)
            plans = [plan for plan in plans if other[plan] <= 1.2 * least]
        assert solution.status is Status.OPTIMAL, seed
        assert solution.objective == pytest.approx(min(values[plan] for plan in plans), rel=1e-9), seed
        fused += bool(compiled.fused(solution.choice or ()))
    assert fused > 4


def test_ranges_count_plans_that_nothing_would_choose() -> None:
    wasteful = {"layers": ["q", "k"], "scheme": "w2", "resources": {"bytes": 100}, "metrics": {"loss": 99}}
    compiled = compile_problem(_table(wasteful), limits=parse_limits(["bytes<=0.5 of range"]))
    assert compiled.problem.rows[0].limit == (8 + 116) // 2


def test_an_explanation_names_covers_and_draws_their_scores_together() -> None:
    stderr = [[0.1] * 3] * 4
    metrics = {"loss": DOCUMENT["metrics"]["loss"] | {"stderr": stderr}}
    table = _table(QKV | {"metrics": {"loss": 4}, "stderr": {"loss": 0.1}}, metrics=metrics)
    question = Question(table, limits=parse_limits(["latency_ns<=26"]))
    compiled = question.compiled()
    solution = solve(compiled.problem, prices=True)
    found = explain(question, solution, draws=50)
    first, last = found.decisions
    assert (first.layers, first.scheme, first.objective) == (("q", "k", "v"), "w4 fused", 4.0)
    assert (last.layers, last.scheme) == (("up",), "w8")
    assert (first.stability, last.stability) == (1.0, 1.0)
    assert first.up is not None
    assert first.up.scheme == "q=w8, k=w4, v=w4"
    assert first.up.resources == {"bytes": 4, "latency_ns": 18}
    assert found.reference is None
    assert found.objective == 4.0
    loose = Question(table, limits=parse_limits(["latency_ns<=46"]))
    drawn = explain(loose, solve(loose.compiled().problem), draws=50).decisions[0]
    assert (drawn.scheme, drawn.stability) == ("q=w8, k=w8, v=w4", 1.0)


def test_covers_that_share_a_score_are_wrong_together() -> None:
    problem = Problem(np.array([[1.0, 1.01]]))
    exact, same = np.zeros((1, 2)), {0: np.array([[1.0, 1.0]])}
    assert stability(problem, exact, (0,), draws=50, shared=same).tolist() == [1.0]
    assert stability(problem, exact, (0,), draws=50, shared={0: np.eye(2)})[0] < 0.9


def test_a_conflict_and_what_would_fit_count_candidates() -> None:
    pin = Restriction("pin", "k=w8", pins={"k": "w8"})
    question = Question(_table(QKV), limits=parse_limits(["latency_ns<=25"]), restrictions=(pin,))
    solution = solve(question.compiled().problem)
    assert solution.status is Status.INFEASIBLE
    assert solution.least_budget == {"latency_ns": 36}
    found = conflict_of(question, solution.least_budget)
    assert found is not None
    assert {member.name: member.objective for member in found.members} == {"latency_ns": 22.0, "k=w8": 8.0}


def test_objectives_that_are_sums_take_candidates() -> None:
    metrics = DOCUMENT["metrics"] | {
        "other": {"direction": "max", "values": [[1, 2, 3]] * 4},
        "third": {"direction": "min", "values": [[3, 2, 1]] * 4},
    }
    metrics["loss"] |= {"stderr": [[1, 0.5, 0]] * 4}
    candidate = QKV | {"metrics": {"loss": 5, "third": 9}, "stderr": {"loss": 4}}
    compiled = compile_problem(
        _table(candidate, metrics=metrics), metric="loss", limits=parse_limits(["latency_ns<=36"])
    )

    def answer(text: str) -> tuple[float | None, int]:
        found = solve_objective(compiled, parse_objective(text)).solution
        assert (found.status, found.choice is not None) == (Status.OPTIMAL, True)
        return found.objective, len(compiled.fused(found.choice or ()))

    assert answer("sum") == (5, 1)
    assert answer("uncertainty: 1") == (9, 1)
    assert answer("uncertainty: 6")[1] == 1
    assert answer("weighted: loss=1, third=0") == (5, 1)
    assert answer("weighted: loss=1, other=100") == (5 - 900, 1)
    assert answer("lexicographic: third, loss")[1] == 1
    assert answer("worst: loss, third") == (10, 1)
    assert answer("weighted_normalized: loss=1")[0] == pytest.approx(5 / 30)


@pytest.mark.parametrize("text", ["minimax", "minimax_sum", "threshold", "rank_order", "quadratic"])
def test_objectives_about_single_layers_refuse_candidates(text: str) -> None:
    with pytest.raises(ObjectiveError, match=rf"objective {text} must have a table without fused candidates"):
        solve_objective(compile_problem(_table(QKV)), parse_objective(text))
    forbidden = compile_problem(_table(QKV), forbidden={"q": ["w4"]})
    if text in ("minimax", "minimax_sum", "threshold"):
        assert solve_objective(forbidden, parse_objective(text)).solution.choice is not None


def test_searches_about_single_layers_refuse_candidates() -> None:
    compiled = compile_problem(_table(QKV))
    plan = dict.fromkeys(("q", "k", "v", "up"), "w4")
    with pytest.raises(CompileError, match="A measured search must have a table without fused candidates"):
        refine(compiled, [Candidate("mine", plan)], lambda plans: [])
    with pytest.raises(CompileError, match="The quadratic model must have"):
        pairwise_model(compiled, np.zeros((4, 3, 1)), 1.0)
    with pytest.raises(CompileError, match="Metric decoupling must have"):
        parts_of(compiled, dict.fromkeys(plan, "loss"))
    with pytest.raises(CompileError, match="A plan by its schemes alone must have"):
        compiled.choice(plan)


def test_more_covers_than_can_be_looked_at_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "at most {} {}. Got more for 3 layers: q, k, v. Keep fewer"
    for name, what in (
        ("MOST_COVERS", "combined choices that no other one beats"),
        ("MOST_COMBINED", "combined choices at a time"),
        ("MOST_FUSINGS", "sets of fused candidates"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(covers, name, 1)
            with pytest.raises(CompileError, match=words.format(1, what)):
                compile_problem(_table(QKV))
    monkeypatch.setattr(compiling, "MOST_CELLS", 10)
    with pytest.raises(CompileError, match="must be at most 10. Got 2 x"):
        compile_problem(_table(QKV))


def test_what_another_cover_beats_is_dropped() -> None:
    compiled = compile_problem(_table(QKV, QKV))
    (group,) = compiled.covers
    options = compiled.covers[group].options
    assert len(options) == len(compiled.covers[group].index) < 27
    assert sum(bool(one.fused) for one in options) == 1
    assert {compiled.label(group, cell) for cell in range(len(options))} >= {"w2", "w8", "w4 fused"}
    assert compiled.problem.schemes[:4] == ("w2", "w4", "w8", "choice 3")
