from __future__ import annotations

from itertools import product

import numpy as np
import optuna
import pytest

from search.black_box import BlackBox, Objectives
from search.budget import parse_limits
from search.compile import Assignment, Compiled, compile_problem
from search.multi_objective import motpe, nsga2
from search.refine import Candidate, Measured
from search.solve import solve

BOTH = pytest.mark.parametrize("chooser", [nsga2, motpe], ids=["nsga2", "motpe"])


@pytest.fixture
def compiled(table) -> Compiled:
    rng = np.random.default_rng(5)
    values = (10 ** rng.uniform(-1, 0.5, (6, 1)) * np.array([1.0, 0.3, 0.08])).tolist()
    sizes = [[int(size * bits) for bits in (2, 3, 4)] for size in rng.integers(10, 60, 6)]
    speeds = [[9, 7, 4] for _ in sizes]
    limits = [f"bytes<={sum(row[1] for row in sizes)}", "speed>=30"]
    found = table(values, {"bytes": sizes, "speed": speeds})
    return compile_problem(found, limits=parse_limits(limits), pins={"l0": "w3"})


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


@BOTH
def test_it_leaves_an_optimum_that_measures_badly(compiled: Compiled, chooser: BlackBox) -> None:
    stored = Stored(compiled)
    found = chooser(compiled, [stored.start()], stored, evaluations=60)
    assert found.source == chooser.source
    assert len(stored.kept) <= 61
    menus = [np.flatnonzero(row) for row in compiled.problem.offered]
    feasible = [choice for choice in product(*menus) if compiled.problem.feasible(choice)]
    values = sorted(stored.value(compiled.assignment(choice)) for choice in feasible)
    assert found.measured.mean <= values[len(values) // 20]
    assert found.measured.mean < stored.value(stored.bad)


@BOTH
def test_a_search_that_was_killed_measures_nothing_twice(compiled: Compiled, chooser: BlackBox) -> None:
    whole, cut = Stored(compiled), Stored(compiled, most=17)
    expected = chooser(compiled, [whole.start()], whole, evaluations=40)
    with pytest.raises(KeyboardInterrupt):
        chooser(compiled, [cut.start()], cut, evaluations=40)
    before = dict(cut.kept)
    cut.most = 1000
    again = chooser(compiled, [cut.start()], cut, evaluations=40)
    assert (again.assignment, again.measured.mean) == (expected.assignment, expected.measured.mean)
    assert [one.assignment for one in again.pareto] == [one.assignment for one in expected.pareto]
    assert cut.kept == whole.kept
    assert list(cut.kept)[:17] == list(before)


@BOTH
def test_its_pareto_set_is_that_of_all_it_measured(compiled: Compiled, chooser: BlackBox) -> None:
    stored = Stored(compiled)
    found = chooser(compiled, [stored.start()], stored, evaluations=40)

    def judged(plan: Assignment) -> tuple[float, ...]:
        used = compiled.resources(plan)
        return stored.value(plan), float(used["bytes"]), -float(used["speed"])

    values = [judged(dict(plan)) for plan in stored.kept]
    best = [
        one
        for one in values
        if not any(all(a <= b for a, b in zip(other, one, strict=True)) and other != one for other in values)
    ]
    assert sorted(judged(one.assignment) for one in found.pareto) == sorted(best)
    assert [one.measured.mean for one in found.pareto] == sorted(one.measured.mean for one in found.pareto)
    assert found.pareto[0].measured.mean == min(value for value, *_ in values)
    for one in found.pareto:
        loss, size, speed = judged(one.assignment)
        assert one.objectives == {"loss": loss, "bytes": size, "speed": -speed}


def test_loss_and_every_limited_total_are_objectives_over_generations(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, make = [], optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **given: studies.append(make(**given)) or studies[-1])
    stored = Stored(compiled)
    nsga2(compiled, [stored.start()], stored, evaluations=40)
    (study,) = studies
    done = [trial for trial in study.trials if trial.values is not None]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE", "MAXIMIZE"]
    for trial in done:
        plan = compiled.assignment([trial.params[f"{group}"] for group in range(6)])
        used = compiled.resources(plan)
        assert trial.values == [stored.value(plan), float(used["bytes"]), float(used["speed"])]
    generations = {
        value for trial in done for key, value in trial.system_attrs.items() if "generation" in key
    }
    assert len(generations) >= 3


def test_what_is_limited_from_both_sides_or_in_part_is_no_objective(table) -> None:
    found = table([[1.0, 0.5]] * 2, {"bytes": [[1, 2]] * 2, "time": [[2, 1]] * 2})
    limits = parse_limits(["bytes>=2", "bytes<=4", "time<=3"])
    compiled = compile_problem(found, limits=limits)
    assert Objectives(compiled, Measured(1.0, 0.0), several=True).names == ("loss", "time")
    assert Objectives(compiled, Measured(1.0, 0.0), several=False).names == ("loss",)


def test_a_loss_that_is_made_of_a_few_is_as_many_objectives(compiled: Compiled) -> None:
    few, many = (Measured(1.0, 0.0, parts=dict.fromkeys(names, 2.0)) for names in ("ab", "abcde"))
    judged = Objectives(compiled, few, several=True)
    assert judged.names == ("a", "b", "bytes", "speed")
    assert judged.directions == ["minimize"] * 3 + ["maximize"]
    assert judged.values((0,) * 6, few)[:2] == [2.0, 2.0]
    assert Objectives(compiled, many, several=True).names == ("loss", "bytes", "speed")
    assert Objectives(compiled, few, several=False).values((0,) * 6, few) == [1.0]
