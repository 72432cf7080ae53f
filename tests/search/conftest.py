from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from search.problem import Problem, Row, integer_matrix
from sensitivity.table import ScoreTable
from sensitivity.table_reader import parse_table


@pytest.fixture
def table() -> Callable[..., ScoreTable]:
    """Builds a table from rows of values and resources; every layer has 8 parameters."""

    def build(
        values: list[list[Any]], resources: dict[str, list[list[Any]]] | None = None, **extra: Any
    ) -> ScoreTable:
        layers = [{"name": f"l{i}", "parameters": 8} for i in range(len(values))]
        for i, group in extra.get("groups", {}).items():
            layers[i]["group"] = group
        return parse_table(
            json.dumps(
                {
                    "schema": "bitplan.table/1",
                    "layers": layers,
                    "schemes": [f"w{c + 2}" for c in range(len(values[0]))],
                    "metrics": {"loss": {"direction": extra.get("direction", "min"), "values": values}},
                    "resources": resources or {},
                }
            )
        )

    return build


@pytest.fixture
def knapsack() -> Callable[..., Problem]:
    """A realistic problem: costs fall and bytes rise with the bits; `rows` limits, bytes at `fill` of the
    range."""

    def build(groups: int, schemes: int, rows: int = 1, *, seed: int = 0, fill: float = 0.4) -> Problem:
        rng = np.random.default_rng(seed)
        size = rng.integers(1_000, 100_000, (groups, 1))
        bits = np.linspace(2, 8, schemes)
        costs = (
            np.abs(rng.normal(size=(groups, 1)))
            * 4.0**-bits
            * rng.uniform(0.5, 1.5, (groups, schemes))
            * size
        )
        usages = [(size * bits / 8).astype(np.int64) + rng.integers(0, 20, (groups, schemes))]
        usages += [np.sort(rng.integers(100, 10_000, (groups, schemes)), axis=1) for _ in range(rows - 1)]
        limits = [int(u.min(1).sum() + fill * (u.max(1) - u.min(1)).sum()) for u in usages]
        return Problem(
            costs,
            tuple(Row(f"r{k}", "<=", u, b) for k, (u, b) in enumerate(zip(usages, limits, strict=True))),
        )

    return build


@pytest.fixture
def random_case() -> Callable[[int], Problem]:
    """Seeded small problems of every kind: mixed scales, nulls, both relations, limits on the edge, both
    directions."""
    return _random_case


def _random_case(seed: int) -> Problem:
    rng = random.Random(seed)
    groups, schemes = rng.randint(1, 8), rng.randint(1, 4)
    costs = np.array([[_cost(rng) for _ in range(schemes)] for _ in range(groups)])
    for row in costs:
        if np.isnan(row).all():
            row[rng.randrange(schemes)] = 1.0
    rows = tuple(_row(rng, f"r{k}", costs) for k in range(rng.randint(0, 3)))
    return Problem(costs, rows, rng.choice(["min", "max"]))


def _cost(rng: random.Random) -> float:
    if rng.random() < 0.15:
        return float("nan")
    kind = rng.randrange(3)
    if kind == 0:
        return rng.uniform(-1, 1)
    return float(rng.randint(-3, 3)) if kind == 1 else 10 ** rng.uniform(-12, 12) * rng.choice([1, 1, 1, -1])


def _row(rng: random.Random, name: str, costs: np.ndarray) -> Row:
    largest = rng.choice([10, 1000, 10**14, 10**20])
    usage = [[rng.randint(0, largest) for _ in row] for row in costs]
    offered = [
        [u for u, c in zip(us, cs, strict=True) if not np.isnan(c)]
        for us, cs in zip(usage, costs, strict=True)
    ]
    total = sum(rng.choice(row) for row in offered)
    limit = int(total * rng.uniform(0.7, 1.3)) if rng.random() < 0.6 else total + rng.choice([-1, 0, 1])
    return Row(name, rng.choice(["<=", "<=", ">="]), integer_matrix(usage), limit)
