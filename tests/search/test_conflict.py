from __future__ import annotations

import random
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import combinations, product

import pytest

from search.budget import parse_limits
from search.compile import CompileError
from search.conflict import Conflict, conflict_of
from search.deadline import Deadline
from search.problem import named_rows
from search.question import Question, Restriction
from sensitivity.table import ScoreTable

Build = Callable[..., ScoreTable]


def _fits(question: Question, names: Collection[str]) -> float | None:
    """The best objective under the limits and restrictions of these names, by enumeration."""
    dropped = [one for one in question.restrictions if one.name not in names]
    problem = question.compiled(dropped).problem
    rows = [row for name, row in named_rows(problem).items() if name in names]
    every = product(range(problem.costs.shape[1]), repeat=len(problem.costs))
    kept = [
        problem.objective(choice)
        for choice in every
        if all(problem.offered[g, c] for g, c in enumerate(choice)) and all(row.holds(choice) for row in rows)
    ]
    return min(kept, default=None)


def _random_question(table: Build, seed: int) -> Question:
    rng = random.Random(seed)
    layers, schemes = rng.randint(2, 4), 3
    values = [[rng.uniform(0, 1) for _ in range(schemes)] for _ in range(layers)]
    grids = {name: [[rng.randint(1, 9) for _ in range(schemes)] for _ in range(layers)] for name in "abc"}
    limits = [f"{name}<={rng.randint(layers, 5 * layers)}" for name in "abc"]
    limits += [f"a>={rng.randint(layers, 6 * layers)}"]
    pin = {f"l{rng.randrange(layers)}": f"w{2 + rng.randrange(schemes)}"}
    restrictions = (
        Restriction("tie", "tie", ties=(("l0", "l1"),)),
        Restriction("pin", "pin", pins=pin),
        Restriction("pin", "second pin", pins={"l1": f"w{2 + rng.randrange(schemes)}"}),
        Restriction("rule", "rule", forbidden={"l0": [f"w{2 + rng.randrange(schemes)}"]}),
    )
    return Question(table(values, grids), limits=parse_limits(limits), restrictions=restrictions)


def _names(question: Question) -> list[str]:
    limits = list(named_rows(question.compiled().problem))
    return [*limits, *(one.name for one in question.restrictions)]


def _questions(table: Build) -> list[Question]:
    """Random ones that can be compiled: a pin to what a rule forbids is refused as bad input."""
    found = []
    for seed in range(40, 60):
        question = _random_question(table, seed)
        with suppress(CompileError):
            question.compiled()
            found.append(question)
    return found


def test_conflicts_are_the_smallest_of_enumeration_and_say_what_giving_way_buys(table: Build) -> None:
    sizes = []
    for question in _questions(table):
        names = _names(question)
        found = conflict_of(question)
        if _fits(question, names) is not None:
            assert found is None
            continue
        assert found is not None
        members = [member.name for member in found.members]
        assert _fits(question, members) is None
        assert all(_fits(question, subset) is not None for subset in combinations(members, len(members) - 1))
        least = next(
            size
            for size in range(len(names) + 1)
            if any(_fits(question, subset) is None for subset in combinations(names, size))
        )
        assert (found.irreducible, found.smallest, len(members)) == (True, True, least)
        _check_relaxed(question, found, names)
        sizes.append(len(members))
    assert {1, 2} <= set(sizes)


def _check_relaxed(question: Question, found: Conflict, names: list[str]) -> None:
    problem = question.compiled().problem
    for member in found.members:
        others = [name for name in names if name != member.name]
        assert member.objective == pytest.approx(
            _fits(question, others) if member.kind != "limit" else _at_least_value(question, member.name)
        )
        if member.kind == "limit":
            row = named_rows(problem)[member.name]
            assert member.limit == row.limit * row.unit
            assert (member.least is None) == (_fits(question, others) is None)
        assert member.fits == (_fits(question, others) is not None)


def _at_least_value(question: Question, name: str) -> float | None:
    """The best objective among the plans that keep everything else and come nearest to one limit."""
    problem = question.compiled().problem
    row = named_rows(problem)[name]
    usage, _ = row.upper()
    every = product(range(problem.costs.shape[1]), repeat=len(problem.costs))
    kept = [
        (sum(int(usage[g, c]) for g, c in enumerate(choice)), problem.objective(choice))
        for choice in every
        if all(problem.offered[g, c] for g, c in enumerate(choice))
        and all(other.holds(choice) for other in problem.rows if other is not row)
    ]
    return min(kept, default=(0, None))[1]


def test_many_restrictions_are_reduced_by_halves(table: Build) -> None:
    built = table([[1.0, 0.0]] * 40, {"bytes": [[1, 2]] * 40})
    pins = tuple(Restriction("pin", f"l{i}=w3", pins={f"l{i}": "w3"}) for i in range(40))
    found = conflict_of(Question(built, limits=parse_limits(["bytes<=60"]), restrictions=pins))
    assert found is not None
    assert [member.kind for member in found.members].count("pin") == 21
    assert (found.irreducible, found.smallest) == (True, False)
    assert {member.objective for member in found.members if member.kind == "pin"} == {None}
    (limit,) = (member for member in found.members if member.kind == "limit")
    assert (limit.limit, limit.least, limit.objective) == (60, 80, 0.0)


def test_without_time_a_conflict_is_not_claimed_to_be_small(
    table: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = table([[1.0, 0.0]] * 8, {"bytes": [[1, 2]] * 8})
    pins = tuple(Restriction("pin", f"l{i}=w3", pins={f"l{i}": "w3"}) for i in range(8))
    question = Question(built, limits=parse_limits(["bytes<=9"]), restrictions=pins)
    assert conflict_of(question, seconds=0.0) is None
    passed = iter([False] * 2 + [True] * 1000)
    monkeypatch.setattr(Deadline, "passed", lambda _: next(passed))
    found = conflict_of(question)
    assert found is not None
    assert (found.irreducible, found.smallest) == (False, False)
    assert {member.fits for member in found.members} == {None}
    assert {"bytes"} < {member.name for member in found.members}


def test_pins_that_a_tie_contradicts_need_no_limit(table: Build) -> None:
    pins = tuple(Restriction("pin", f"{n}={s}", pins={n: s}) for n, s in (("l0", "w2"), ("l1", "w3")))
    tie = Restriction("tie", "l0+l1", ties=(("l0", "l1"),))
    built = table([[1.0, 0.0]] * 2, {"bytes": [[1, 2]] * 2})
    found = conflict_of(Question(built, limits=parse_limits(["bytes<=9"]), restrictions=(*pins, tie)))
    assert found is not None
    assert {member.name: member.objective for member in found.members} == {
        "l0=w2": 0.0,
        "l1=w3": 2.0,
        "l0+l1": 1.0,
    }
