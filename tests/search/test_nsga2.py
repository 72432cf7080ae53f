from __future__ import annotations

from itertools import product

import numpy as np
import pytest

import search.nsga2 as module
from search.budget import parse_limits
from search.compile import Assignment, Compiled, compile_problem
from search.nsga2 import SOURCE, nsga2
from search.refine import Candidate, Measured
from search.solve import solve


@pytest.fixture
def compiled(table) -> Compiled:
    rng = np.random.default_rng(5)
    values = (10 ** rng.uniform(-1, 0.5, (6, 1)) * np.array([1.0, 0.3, 0.08])).tolist()
    sizes = [[int(size * bits) for bits in (2, 3, 4)] for size in rng.integers(10, 60, 6)]
    limits = [f"bytes<={sum(row[1] for row in sizes)}", f"bytes>={sum(row[0] for row in sizes)}"]
    return compile_problem(table(values, {"bytes": sizes}), limits=parse_limits(limits), pins={"l0": "w3"})


class Stored:
    """Measurements that outlive a search: what the additive optimum gives the last three layers costs more."""

    def __init__(self, compiled: Compiled, most: int = 1000) -> None:
        self.compiled, self.most, self.kept = compiled, most, {}
        self.bad = compiled.assignment(solve(compiled.problem).choice)

    def __call__(self, plans: list[Assignment]) -> list[Measured]:
        for plan in plans:
            if tuple(plan.items()) not in self.kept:
                if len(self.kept) == self.most:
                    raise KeyboardInterrupt
                self.kept[tuple(plan.items())] = self.value(plan)
        return [Measured(self.kept[tuple(plan.items())], 0.0) for plan in plans]

    def value(self, plan: Assignment) -> float:
        return self.compiled.objective(plan) + sum(
            plan[name] == self.bad[name] for name in ("l3", "l4", "l5")
        )

    def start(self) -> Candidate:
        return Candidate("additive loss", self.bad)


def test_it_leaves_an_optimum_that_measures_badly(compiled: Compiled) -> None:
    stored = Stored(compiled)
    found = nsga2(compiled, [stored.start()], stored, evaluations=60)
    assert found.source == SOURCE
    assert len(stored.kept) <= 61
    menus = [np.flatnonzero(row) for row in compiled.problem.offered]
    feasible = [choice for choice in product(*menus) if compiled.problem.feasible(choice)]
    values = sorted(stored.value(compiled.assignment(choice)) for choice in feasible)
    assert found.measured.mean <= values[len(values) // 50]
    assert found.measured.mean < stored.value(stored.bad)


def test_a_search_that_was_killed_measures_nothing_twice(compiled: Compiled) -> None:
    whole, cut = Stored(compiled), Stored(compiled, most=17)
    expected = nsga2(compiled, [whole.start()], whole, evaluations=40)
    with pytest.raises(KeyboardInterrupt):
        nsga2(compiled, [cut.start()], cut, evaluations=40)
    before = dict(cut.kept)
    cut.most = 1000
    again = nsga2(compiled, [cut.start()], cut, evaluations=40)
    assert (again.assignment, again.measured.mean) == (expected.assignment, expected.measured.mean)
    assert cut.kept == whole.kept
    assert list(cut.kept)[:17] == list(before)


def test_loss_and_every_limited_total_are_objectives_over_generations(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = []
    make = module._study
    monkeypatch.setattr(module, "_study", lambda *given: studies.append(make(*given)) or studies[-1])
    stored = Stored(compiled)
    nsga2(compiled, [stored.start()], stored, evaluations=40)
    (study,) = studies
    done = [trial for trial in study.trials if trial.values is not None]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE", "MAXIMIZE"]
    for trial in done:
        choice = [trial.params[f"{group}"] for group in range(6)]
        used = float(compiled.problem.rows[0].total(choice))
        assert trial.values == [stored.value(compiled.assignment(choice)), used, used]
    generations = {
        value for trial in done for key, value in trial.system_attrs.items() if "generation" in key
    }
    assert len(generations) >= 3
