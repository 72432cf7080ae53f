from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from search.budget import BudgetError, parse_limit, parse_limits
from search.compile import CompileError, compile_problem, exact_number
from search.problem import Status
from search.solve import solve
from sensitivity.table import ScoreTable

Build = Callable[..., ScoreTable]
VALUES = [[0.9, 0.1, 0.0], [0.5, 0.2, 0.0], [0.3, 0.1, 0.0]]
BYTES = [[2, 4, 8], [2, 4, 8], [2, 4, 8]]


def test_groups_and_ties_become_one_row(table: Build) -> None:
    built = table(VALUES, {"bytes": BYTES}, groups={0: "g", 1: "g"})
    compiled = compile_problem(built, limits=parse_limits(["bytes<=14"]))
    assert compiled.groups == ((0, 1), (2,))
    assert compiled.problem.groups == ("l0+l1", "l2")
    assert compiled.problem.costs[0].tolist() == [1.4, pytest.approx(0.3), 0.0]
    assert compiled.problem.rows[0].usage.tolist() == [[4, 8, 16], [2, 4, 8]]
    joined = compile_problem(built, ties=[["l1", "l2"]])
    assert joined.groups == ((0, 1, 2),)


def test_solutions_come_back_as_layers_and_schemes(table: Build) -> None:
    compiled = compile_problem(
        table(VALUES, {"bytes": BYTES}), limits=[parse_limit("bytes<=12")], pins={"l2": "w3"}
    )
    solution = solve(compiled.problem)
    assert solution.choice is not None
    assignment = compiled.assignment(solution.choice)
    assert assignment == {"l0": "w3", "l1": "w3", "l2": "w3"}
    assert compiled.choice(assignment) == solution.choice
    assert compiled.objective(assignment) == pytest.approx(0.4)
    assert compiled.resources(assignment) == {"bytes": 12, "bits_per_weight": 4}


def test_bits_per_weight_counts_stored_bits(table: Build) -> None:
    compiled = compile_problem(table(VALUES, {"bytes": BYTES}), limits=[parse_limit("4 bpw")])
    row = compiled.problem.rows[0]
    assert row.limit * row.unit == 4
    assert row.holds(compiled.choice({"l0": "w3", "l1": "w3", "l2": "w3"}))
    assert not row.holds(compiled.choice({"l0": "w4", "l1": "w3", "l2": "w3"}))


def test_decimals_are_compared_exactly(table: Build) -> None:
    built = table([[1.0, 0.0], [1.0, 0.0]], {"latency_ns": [[0.1, 0.2], [0.1, 0.1]]})
    assert solve(compile_problem(built, limits=[parse_limit("latency_ns<=0.3")]).problem).choice == (1, 1)
    tight = solve(compile_problem(built, limits=[parse_limit("latency_ns<=0.29999999999999999")]).problem)
    assert tight.choice == (0, 1)


def test_a_part_of_the_range_lies_between_the_extremes_ties_and_pins_allow(table: Build) -> None:
    built = table(VALUES, {"bytes": BYTES})
    [row] = compile_problem(
        built, limits=[parse_limit("bytes<=0.25 of range")], pins={"l0": "w4"}
    ).problem.rows
    assert row.limit == 8 + 2 + 2 + 12 // 4


@pytest.mark.parametrize(
    ("text", "total"), [("uniform w3", 12), ("bpw<=uniform w4", 8), ("bytes>=uniform w2", 6)]
)
def test_a_uniform_scheme_stands_for_its_total(table: Build, text: str, total: int) -> None:
    [row] = compile_problem(table(VALUES, {"bytes": BYTES}), limits=[parse_limit(text)]).problem.rows
    assert row.limit * row.unit == total


def test_a_uniform_scheme_leaves_caches_as_they_are(table: Build) -> None:
    """l0 and l1 are weights with w2 and w3, l2 is a cache with w4 (kept) and w8."""
    values = [[0.2, 0.1, None, None], [0.2, 0.1, None, None], [None, None, 0.0, 0.3]]
    sizes = [[2, 3, None, None], [2, 3, None, None], [None, None, 0, 0]]
    memory = [[2, 3, None, None], [2, 3, None, None], [None, None, 16, 8]]
    cache = [[0, 0, None, None], [0, 0, None, None], [None, None, 16, 8]]
    built = table(values, {"bytes": sizes, "memory_bytes": memory, "cache_bytes": cache})
    kept = (*built.layers[:2], replace(built.layers[2], parameters=0, kept=built.schemes[2]))
    built = replace(built, layers=kept)
    first, last = built.schemes[1], built.schemes[3]
    for text, total in [
        (f"bytes<=uniform {first}", 6),
        (f"memory_bytes<=uniform {first}", 22),
        (f"cache_bytes<=uniform {last}", 8),
    ]:
        [row] = compile_problem(built, limits=[parse_limit(text)]).problem.rows
        assert row.limit * row.unit == total, text
    with pytest.raises(CompileError, match=f"Got {last}, which l0 does not offer"):
        compile_problem(built, limits=[parse_limit(f"memory_bytes<=uniform {last}")])


def test_a_uniform_scheme_must_exist_everywhere(table: Build) -> None:
    built = table([[1.0, 0.5]], {"bytes": [[1, None]]})
    with pytest.raises(CompileError, match="Got w3, which l0 does not offer"):
        compile_problem(built, limits=[parse_limit("uniform w3")])
    with pytest.raises(CompileError, match="scheme of a uniform limit must be in the table"):
        compile_problem(built, limits=[parse_limit("uniform w9")])


def test_the_tightest_of_repeated_limits_holds(table: Build) -> None:
    limits = parse_limits(["bytes<=14,bytes<=12", "bytes>=3,bytes>=7"])
    rows = compile_problem(table(VALUES, {"bytes": BYTES}), limits=limits).problem.rows
    assert [(row.relation, row.limit) for row in rows] == [("<=", 12), (">=", 7)]


def test_null_means_not_offered_wherever_it_stands(table: Build) -> None:
    built = table([[1.0, None], [1.0, 0.5]], {"bytes": [[1, 2], [None, 2]]})
    compiled = compile_problem(built)
    assert np.isnan(compiled.problem.costs).tolist() == [[False, True], [True, False]]
    tied = compile_problem(built, ties=[["l0", "l1"]])
    assert solve(tied.problem).status is Status.INFEASIBLE


def test_contradicting_pins_in_a_tie_are_infeasible_not_an_error(table: Build) -> None:
    compiled = compile_problem(table(VALUES), ties=[["l0", "l1"]], pins={"l0": "w2", "l1": "w3"})
    solution = solve(compiled.problem)
    assert solution.status is Status.INFEASIBLE
    assert "l0+l1" in solution.reason


def test_the_menu_can_be_restricted(table: Build) -> None:
    compiled = compile_problem(table(VALUES), schemes=["w2", "w3"])
    assert compiled.problem.offered.tolist() == [[True, True, False]] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pins": {"l9": "w2"}}, "pinned layer must be in the table. Got 'l9'. Close names: l"),
        ({"pins": {"l0": "w9"}}, "scheme must be in the table. Got 'w9'"),
        ({"ties": [["l0", "zzz"]]}, "tied layer must be in the table. Got 'zzz'. Known names: l0, l1, l2"),
        ({"ties": [["l0"]]}, "at least two layers"),
        ({"metric": "los"}, "metric must be in the table. Got 'los'. Close names: loss"),
        ({"schemes": ["w7"]}, "scheme must be in the table"),
    ],
)
def test_unknown_names_are_refused_with_close_ones(
    table: Build, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(CompileError, match=words):
        compile_problem(table(VALUES), **arguments)  # type: ignore[arg-type]


def test_pins_to_what_is_not_offered_are_refused(table: Build) -> None:
    with pytest.raises(CompileError, match="Offered: w3"):
        compile_problem(table([[None, 1.0]]), pins={"l0": "w2"})


def test_limits_must_be_on_resources_of_the_table(table: Build) -> None:
    with pytest.raises(BudgetError, match=r"Got 'byte'\. Close names: bytes"):
        compile_problem(table(VALUES, {"bytes": BYTES}), limits=[parse_limit("byte<=3")])
    with pytest.raises(BudgetError, match="no resources"):
        compile_problem(table(VALUES), limits=[parse_limit("3 bpw")])


def test_assignments_that_break_a_tie_are_refused(table: Build) -> None:
    compiled = compile_problem(table(VALUES), ties=[["l0", "l1"]])
    with pytest.raises(CompileError, match="must all have one scheme"):
        compiled.choice({"l0": "w2", "l1": "w3", "l2": "w2"})
    with pytest.raises(CompileError, match="must all have one scheme"):
        compiled.choice({"l0": "w2", "l1": "w2"})


def test_totals_are_integers_where_they_can_be() -> None:
    assert exact_number(Fraction(6, 2)) == 3
    assert isinstance(exact_number(Fraction(6, 2)), int)
    assert exact_number(Fraction(5, 2)) == 2.5


@pytest.mark.parametrize(
    ("text", "share"),
    [("bytes<=6", 6), ("3 bpw", 6), ("bytes<=50% of range", 10), ("uniform w3", 8), ("bytes>=12", -12)],
)
def test_a_limit_may_be_about_some_layers_alone(table: Build, text: str, share: int) -> None:
    """Against every choice: the first two layers keep their own limit, all three the common one."""
    inside = frozenset({"l0", "l1"})
    scoped = [replace(limit, scope="few", layers=inside) for limit in parse_limits([text])]
    limits = [*parse_limits(["bytes<=18"]), *scoped]
    compiled = compile_problem(table(VALUES, {"bytes": BYTES}), limits=limits)
    allowed = [
        sum(VALUES[layer][c] for layer, c in enumerate(choice))
        for choice in itertools.product(range(3), repeat=3)
        if sum(BYTES[layer][c] for layer, c in enumerate(choice)) <= 18
        and _keeps(sum(BYTES[layer][choice[layer]] for layer in (0, 1)), share)
    ]
    solution = solve(compiled.problem)
    assert solution.objective == pytest.approx(min(allowed))
    assert {row.resource.partition("[")[2] for row in compiled.problem.rows} == {"", "few]"}


def _keeps(used: int, share: int) -> bool:
    return used <= share if share > 0 else used >= -share


def test_a_scoped_limit_that_nothing_keeps_is_named(table: Build) -> None:
    scoped = replace(parse_limit("bytes<=1"), scope="l0", layers=frozenset({"l0"}))
    compiled = compile_problem(table(VALUES, {"bytes": BYTES}), limits=[scoped])
    solution = solve(compiled.problem)
    assert solution.status is Status.INFEASIBLE
    assert solution.least_budget == {"bytes[l0]": 2}
