"""Random tables with ties, pins, forbidden schemes, nulls, bands, maxima and limits, against every assignment of
their layers."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from search.budget import Limit
from search.compile import compile_problem
from search.problem import Status
from search.solve import solve
from sensitivity.table import ScoreTable
from sensitivity.table_reader import parse_table

CASES = 300
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


def _everything(case: Case) -> np.ndarray:
    """Every assignment of schemes to layers that ties, groups, pins and nulls allow: (assignments,
    layers)."""
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
    offered = table.offered("m")[np.arange(len(table.layers)), choices].all(axis=1)
    return choices[allowed & offered]


def _quarters(case: Case, name: str) -> np.ndarray:
    return np.array([[int(4 * Fraction(value or 0)) for value in row] for row in case.table.resources[name]])


def _feasible(case: Case, choices: np.ndarray) -> np.ndarray:
    layers = np.arange(choices.shape[1])
    keeps = np.ones(len(choices), dtype=bool)
    index = {layer.name: i for i, layer in enumerate(case.table.layers)}
    for limit in case.limits:
        if limit.resource in case.table.maxima:
            cells = _quarters(case, "r0")[layers, choices]
            cuts = [[index[name] for name in cut] for cut in case.table.maxima[limit.resource].cuts]
            keeps &= np.max([cells[:, cut].sum(axis=1) for cut in cuts], axis=0) <= int(4 * limit.value // 1)
            continue
        totals = _quarters(case, limit.resource)[layers, choices].sum(axis=1)
        value = 4 * limit.value
        if limit.of_range:
            value = (
                int(totals.min()) + limit.value * int(totals.max() - totals.min())
                if len(totals)
                else Fraction(0)
            )
        keeps &= totals <= int(value // 1) if limit.relation == "<=" else totals >= -int(-value // 1)
    return choices[keeps]


def test_random_tables_equal_every_assignment_tried() -> None:
    _agree(range(CASES))


@pytest.mark.slow
def test_thousands_of_random_tables_equal_every_assignment_tried() -> None:
    _agree(range(CASES, MANY))


def _agree(seeds: range) -> None:
    seen: dict[Status, int] = {}
    for seed in seeds:
        case = _case(seed)
        compiled = compile_problem(
            case.table, limits=case.limits, ties=case.ties, pins=case.pins, forbidden=case.forbidden
        )
        solution = solve(compiled.problem)
        choices = _feasible(case, _everything(case))
        seen[solution.status] = seen.get(solution.status, 0) + 1
        if not len(choices):
            assert solution.status is Status.INFEASIBLE, seed
            continue
        metric = case.table.metrics["m"]
        totals = metric.values[np.arange(choices.shape[1]), choices].sum(axis=1)
        best = totals.min() if metric.direction == "min" else totals.max()
        assert solution.status is Status.OPTIMAL, seed
        assert solution.choice is not None
        assignment = compiled.assignment(solution.choice)
        assert compiled.objective(assignment) == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        row = [case.table.schemes.index(scheme) for scheme in assignment.values()]
        assert (choices == row).all(axis=1).any(), seed
    assert min(seen.values()) > 60
    assert len(seen) == 2
