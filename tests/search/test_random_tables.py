"""Random tables with ties, pins, forbidden schemes, nulls, fused candidates, bands, maxima and limits, against
every plan there is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from search.budget import Limit
from search.compile import compile_problem
from search.frontier import between, frontier
from search.problem import Status
from search.solve import solve
from sensitivity.table import Fused, ScoreTable
from sensitivity.table_reader import parse_table

CASES = 250
MANY = 5000


@dataclass(frozen=True)
class Case:
    table: ScoreTable
    limits: tuple[Limit, ...]
    ties: tuple[tuple[str, ...], ...]
    pins: dict[str, str]
    forbidden: dict[str, tuple[str, ...]]


def _case(seed: int) -> Case:
    rng = random.Random(seed)
    layers, schemes = rng.randint(1, 8), rng.randint(1, 4)
    names = [f"l{i}" for i in range(layers)]
    document: dict[str, Any] = {
        "schema": "bitplan.table/1",
        "layers": [_layer(rng, name) for name in names],
        "schemes": [f"s{c}" for c in range(schemes)],
        "metrics": {
            "m": {"direction": rng.choice(["min", "max"]), "values": _matrix(rng, layers, schemes, _value)}
        },
        "resources": {f"r{k}": _matrix(rng, layers, schemes, _usage) for k in range(rng.randint(1, 3))},
    }
    for row in document["metrics"]["m"]["values"]:
        for scheme in range(1, schemes):
            if rng.random() < 0.1:
                row[scheme] = None
    if layers > 1 and rng.random() < 0.5:
        document["fused"] = [_fused(rng, document, names) for _ in range(rng.randint(1, 4))]
    document["maxima"] = _maxima(rng, names) if rng.random() < 0.3 else {}
    ties = tuple(tuple(rng.sample(names, 2)) for _ in range(rng.choice([0, 0, 1, 2])) if layers > 1)
    pins = {name: "s0" for name in names if rng.random() < 0.08}
    forbidden = {name: (f"s{schemes - 1}",) for name in names if name not in pins and rng.random() < 0.08}
    table = parse_table(json.dumps(document))
    return Case(table, (*_limits(rng, document["resources"]), *_peaks(rng, table)), ties, pins, forbidden)


def _maxima(rng: random.Random, names: list[str]) -> dict[str, Any]:
    cuts = [rng.sample(names, rng.randint(1, len(names))) for _ in range(rng.randint(1, 3))]
    return {"peak": {"resource": "r0", "cuts": cuts}}


def _peaks(rng: random.Random, table: ScoreTable) -> tuple[Limit, ...]:
    return tuple(Limit(name, "<=", Fraction(rng.randint(1, 50 * len(table.layers)))) for name in table.maxima)


def _fused(rng: random.Random, document: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A candidate that states each number or not; always a score where a cell has none."""
    layers = rng.sample(names[:5], rng.randint(2, min(3, len(names))))
    scheme = rng.randrange(len(document["schemes"]))
    cells = [document["metrics"]["m"]["values"][names.index(name)][scheme] for name in layers]
    own = None in cells or rng.random() < 0.6
    score = _value(rng) if None in cells or rng.random() < 0.5 else sum(cells) - abs(_value(rng)) / 8
    used = {name: _usage(rng) * 2 for name in document["resources"] if rng.random() < 0.5}
    return {
        "layers": layers,
        "scheme": f"s{scheme}",
        "metrics": {"m": score} if own else {},
        "resources": used,
    }


def _layer(rng: random.Random, name: str) -> dict[str, Any]:
    layer: dict[str, Any] = {"name": name, "parameters": rng.randint(1, 99)}
    return layer | {"group": rng.choice("ab")} if rng.random() < 0.2 else layer


def _matrix(rng: random.Random, layers: int, schemes: int, draw: Any) -> list[list[Any]]:
    return [[draw(rng) for _ in range(schemes)] for _ in range(layers)]


def _value(rng: random.Random) -> float:
    return rng.choice([rng.uniform(-1, 1), rng.randint(-2, 2), 10 ** rng.uniform(-12, 3)])


def _usage(rng: random.Random) -> float:
    return rng.choice([rng.randint(0, 50), rng.randint(0, 200) / 4])


def _limits(rng: random.Random, resources: dict[str, list[list[float]]]) -> tuple[Limit, ...]:
    limits = []
    for name, rows in resources.items():
        low, high = sum(map(min, rows)), sum(map(max, rows))
        if rng.random() < 0.25:
            limits.append(Limit(name, "<=", Fraction(rng.randint(0, 100), 100), of_range=True))
            continue
        value = Fraction(low + rng.random() * (high - low)).limit_denominator(8)
        if value > 0:
            limits.append(Limit(name, rng.choice(["<=", "<=", ">="]), value))
            if limits[-1].relation == ">=" and rng.random() < 0.5:
                limits.append(Limit(name, "<=", value + rng.randint(0, 40)))
    return tuple(limits)


@dataclass(frozen=True)
class Plans:
    """Plans that have the same fused candidates: schemes of every layer, shape (plans, layers)."""

    fused: tuple[Fused, ...]
    schemes: np.ndarray


def _everything(case: Case) -> list[Plans]:
    """Every plan that ties, groups, pins, forbidden schemes and nulls allow: layers have one scheme each, and
    no two candidates a layer in common.
    """
    table = case.table
    shape = (len(table.schemes),) * len(table.layers)
    choices = np.indices(shape).reshape(len(table.layers), -1).T
    allowed = np.ones(len(choices), dtype=bool)
    index = {layer.name: i for i, layer in enumerate(table.layers)}
    grouped: dict[str, list[int]] = {}
    for i, layer in enumerate(table.layers):
        grouped.setdefault(layer.group or f"alone {i}", []).append(i)
    for members in [*grouped.values(), *([index[name] for name in tie] for tie in case.ties)]:
        allowed &= (choices[:, members] == choices[:, members[:1]]).all(axis=1)
    for name, scheme in case.pins.items():
        allowed &= choices[:, index[name]] == table.schemes.index(scheme)
    for name, schemes in case.forbidden.items():
        for scheme in schemes:
            allowed &= choices[:, index[name]] != table.schemes.index(scheme)
    choices = choices[allowed]
    offered = table.offered("m")[np.arange(len(table.layers)), choices]
    found = []
    for size in range(len(table.fused) + 1):
        for fused in combinations(table.fused, size):
            covered = [index[name] for one in fused for name in one.layers]
            if len(set(covered)) < len(covered):
                continue
            fits = np.delete(offered, covered, axis=1).all(axis=1)
            for one in fused:
                column = table.schemes.index(one.scheme)
                fits &= (choices[:, [index[name] for name in one.layers]] == column).all(axis=1)
            found.append(Plans(fused, choices[fits]))
    return found


def _quarters(case: Case, name: str) -> np.ndarray:
    return np.array([[int(4 * Fraction(value or 0)) for value in row] for row in case.table.resources[name]])


def _used(case: Case, plans: Plans, name: str, layers: Sequence[str] | None = None) -> np.ndarray:
    """Four times the usage of a resource by some layers; what is said of a candidate as a whole counts whole."""
    names, cells = case.table.layer_names, _quarters(case, name)
    wanted = set(names if layers is None else layers)
    stated = [one for one in plans.fused if name in one.resources]
    apart = wanted - {layer for one in stated for layer in one.layers}
    columns = [i for i, layer in enumerate(names) if layer in apart]
    total = cells[columns, plans.schemes[:, columns]].sum(axis=1)
    return total + sum(int(4 * one.resources[name]) for one in stated if wanted & set(one.layers))


def _scores(case: Case, plans: Plans) -> np.ndarray:
    stated = [one for one in plans.fused if "m" in one.metrics]
    apart = set(case.table.layer_names) - {layer for one in stated for layer in one.layers}
    columns = [i for i, layer in enumerate(case.table.layer_names) if layer in apart]
    total = case.table.metrics["m"].values[columns, plans.schemes[:, columns]].sum(axis=1)
    return total + sum(one.metrics["m"] for one in stated)


def _feasible(case: Case, everything: list[Plans]) -> list[Plans]:
    keeps = [np.ones(len(plans.schemes), dtype=bool) for plans in everything]
    for limit in case.limits:
        value = 4 * limit.value
        if limit.resource in case.table.maxima:
            cuts = case.table.maxima[limit.resource].cuts
            totals = [np.max([_used(case, plans, "r0", cut) for cut in cuts], axis=0) for plans in everything]
        else:
            totals = [_used(case, plans, limit.resource) for plans in everything]
        together = np.concatenate(totals)
        if limit.of_range and len(together):
            value = int(together.min()) + limit.value * int(together.max() - together.min())
        if limit.relation == "<=":
            keeps = [keep & (total <= int(value // 1)) for keep, total in zip(keeps, totals, strict=True)]
        else:
            keeps = [keep & (total >= -int(-value // 1)) for keep, total in zip(keeps, totals, strict=True)]
    pairs = zip(everything, keeps, strict=True)
    return [Plans(plans.fused, plans.schemes[keep]) for plans, keep in pairs if keep.any()]


def test_random_tables_equal_every_assignment_tried() -> None:
    _agree(range(CASES))


@pytest.mark.slow
def test_thousands_of_random_tables_equal_every_assignment_tried() -> None:
    _agree(range(CASES, MANY))


def _agree(seeds: range) -> None:
    seen: dict[Status, int] = {}
    fused = 0
    for seed in seeds:
        case = _case(seed)
        compiled = compile_problem(
            case.table, limits=case.limits, ties=case.ties, pins=case.pins, forbidden=case.forbidden
        )
        solution = solve(compiled.problem)
        feasible = _feasible(case, _everything(case))
        seen[solution.status] = seen.get(solution.status, 0) + 1
        if not feasible:
            assert solution.status is Status.INFEASIBLE, seed
            continue
        totals = np.concatenate([_scores(case, plans) for plans in feasible])
        best = totals.min() if case.table.metrics["m"].direction == "min" else totals.max()
        assert solution.status is Status.OPTIMAL, seed
        assert solution.choice is not None
        assignment, used = compiled.assignment(solution.choice), compiled.fused(solution.choice)
        assert compiled.objective(assignment, used) == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        row = [case.table.schemes.index(scheme) for scheme in assignment.values()]
        (same,) = [plans for plans in feasible if set(plans.fused) == set(used)]
        (place,) = np.flatnonzero((same.schemes == row).all(axis=1))
        resources = compiled.resources(assignment, used)
        for name in case.table.resources:
            assert 4 * resources[name] == _used(case, same, name)[place], seed
        fused += bool(used)
    assert min(seen.values()) > 50
    assert len(seen) == 2
    assert fused > 25


def test_random_frontiers_with_candidates_equal_every_plan_tried() -> None:
    tried = 0
    for seed in range(MANY, MANY + 60):
        case = _case(seed)
        everything = [plans for plans in _everything(case) if len(plans.schemes)]
        if not case.table.fused or not everything:
            continue
        sign = 1 if case.table.metrics["m"].direction == "min" else -1
        used = np.concatenate([_used(case, plans, "r0") for plans in everything])
        scores = sign * np.concatenate([_scores(case, plans) for plans in everything])
        curve: dict[Fraction, float] = {}
        for total in np.unique(used):
            best = scores[used == total].min()
            if best < min(curve.values(), default=np.inf) - 1e-12:
                curve[Fraction(int(total), 4)] = best
        compiled = compile_problem(case.table, ties=case.ties, pins=case.pins, forbidden=case.forbidden)
        found = between(compiled, "r0", Fraction(0), Fraction(10**6), most=1000)
        assert [point.used for point in found.points] == list(curve), seed
        assert [sign * point.objective for point in found.points] == pytest.approx(list(curve.values()))
        assert {point.used for point in frontier(compiled, "r0")} <= set(curve), seed
        tried += 1
    assert tried > 15
