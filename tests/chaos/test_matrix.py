"""Processes killed at every failpoint by order of a seed: what anybody saw is there at the end.

Again, with another seed or more kills:
BITPLAN_CHAOS_SEED=7 BITPLAN_CHAOS_KILLS=200 pytest tests/chaos/test_matrix.py -m slow -s
"""

from __future__ import annotations

import os

import pytest

SEED = int(os.environ.get("BITPLAN_CHAOS_SEED", "1"))


def kills(usual: int) -> int:
    return int(os.environ.get("BITPLAN_CHAOS_KILLS", usual))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_are_survived(survive):
    told = survive(SEED, kills(25))
    assert told["kills"] >= kills(25)
    assert set(told["by_role"]) == {"api", "runner"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_workers_are_survived(survive):
    told = survive(SEED, kills(15), executor="local_pool")
    assert any(place.startswith("worker.") for place in told["places"]), told


@pytest.mark.postgres
@pytest.mark.timeout(900)
def test_kills_are_survived_on_postgresql(survive, postgres_url):
    assert survive(SEED, kills(25), url=postgres_url)["kills"] >= kills(25)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_beside_ray_are_survived(survive, ray_variables):
    told = survive(SEED, kills(6), executor="ray", variables=ray_variables)
    assert set(told["by_role"]) == {"api", "runner"}
    assert told["scores_seen"] > 0


def nightly(database: str, executor: str, seeds: range, count: int) -> list[object]:
    marks = [pytest.mark.postgres] if database == "postgres" else []
    return [pytest.param(database, executor, seed, count, marks=marks) for seed in seeds]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("database", "executor", "seed", "count"),
    [
        *nightly("sqlite", "in_process", range(100, 104), 100),
        *nightly("sqlite", "local_pool", range(200, 202), 50),
        *nightly("postgres", "in_process", range(300, 304), 100),
        *nightly("postgres", "local_pool", range(400, 402), 50),
        *nightly("sqlite", "ray", range(500, 501), 40),
        *nightly("postgres", "ray", range(600, 601), 40),
    ],
)
def test_a_thousand_kills_are_survived(survive, request, database, executor, seed, count):
    """In all: 100 by each of eight seeds, 50 by each of four, 40 by each of two."""
    url = request.getfixturevalue("postgres_url") if database == "postgres" else ""
    variables = request.getfixturevalue("ray_variables") if executor == "ray" else None
    assert survive(seed, count, url=url, executor=executor, variables=variables)["kills"] >= count
