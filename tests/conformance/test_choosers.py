"""What every measured search must keep: limits, determinism, and never worse than a candidate."""

from __future__ import annotations

import json

import numpy as np
import pytest

from search.budget import parse_limits
from search.choosers import CHOOSERS
from search.compile import compile_problem
from search.refine import Candidate, Measured
from search.solve import solve
from sensitivity.table_reader import parse_table


def problem(seed):
    rng = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(7)]
    sizes = rng.integers(10, 60, 7)
    table = {
        "schema": "bitplan.table/1",
        "layers": [{"name": name, "parameters": 8} for name in names],
        "schemes": ["w2", "w3", "w4"],
        "metrics": {"loss": {"direction": "min", "values": (rng.random((7, 1)) * [1.0, 0.4, 0.1]).tolist()}},
        "resources": {"bytes": [[int(size) * bits for bits in (2, 3, 4)] for size in sizes]},
    }
    limit = int(3 * sizes.sum())
    return compile_problem(
        parse_table(json.dumps(table)),
        limits=parse_limits([f"bytes<={limit}"]),
        pins={"l0": "w4"},
        ties=[("l1", "l2")],
    )


class Truth:
    def __init__(self, compiled, seed):
        self.compiled, self.noise, self.plans = compiled, np.random.default_rng(seed).normal(size=(7, 3)), []

    def __call__(self, assignments):
        self.plans += [dict(plan) for plan in assignments]
        return [self.value(plan) for plan in assignments]

    def value(self, plan):
        columns = [self.compiled.table.schemes.index(plan[name]) for name in self.compiled.table.layer_names]
        bumps = 0.3 * np.abs(self.noise[np.arange(7), columns])
        return Measured(self.compiled.objective(plan) + float(bumps.sum()), 0.01, np.zeros(2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CHOOSERS)
def test_keeps_limits_and_is_never_worse_than_a_candidate(name, seed):
    compiled = problem(seed)
    start = Candidate("additive", compiled.assignment(solve(compiled.problem).choice))
    truth = Truth(compiled, seed)
    found = CHOOSERS[name].choose(compiled, [start], truth, evaluations=20)
    assert all(compiled.problem.feasible(compiled.choice(plan)) for plan in truth.plans)
    assert len(truth.plans) <= 21
    assert found.measured.mean == min(truth.value(plan).mean for plan in truth.plans)
    assert found.measured.mean <= truth.value(start.assignment).mean
    again = CHOOSERS[name].choose(compiled, [start], Truth(compiled, seed), evaluations=20)
    assert (again.assignment, again.source) == (found.assignment, found.source)


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_candidate_that_breaks_the_budget_is_refused(name):
    compiled = problem(0)
    everything = dict.fromkeys(compiled.table.layer_names, "w4")
    with pytest.raises(ValueError, match="must keep every limit and pin"):
        CHOOSERS[name].choose(compiled, [Candidate("uniform w4", everything)], Truth(compiled, 0))
