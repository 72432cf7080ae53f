from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from search.problem import Problem, ProblemError, Row, Status, answered, integer_matrix, relative_gap


def test_gap_follows_its_definition_in_both_directions() -> None:
    assert relative_gap(2.0, 1.0) == 0.5
    assert relative_gap(-2.0, -3.0) == 0.5
    assert relative_gap(2.0, 3.0, "max") == 0.5
    assert relative_gap(0.0, -1e-13) == pytest.approx(0.1)
    assert relative_gap(1.0, 1.1) == 0.0


def test_rows_are_decided_on_integers() -> None:
    usage = np.array([[10**14, 10**14 + 1]])
    at_most = Row("bytes", "<=", usage, 10**14)
    assert at_most.holds((0,))
    assert not at_most.holds((1,))
    at_least = Row("bytes", ">=", usage, 10**14 + 1)
    assert [at_least.holds((c,)) for c in (0, 1)] == [False, True]
    negated, limit = at_least.upper()
    assert negated.tolist() == [[-(10**14), -(10**14) - 1]]
    assert limit == -(10**14) - 1


def test_integers_beyond_64_bits_stay_exact() -> None:
    matrix = integer_matrix([[2**70, 1], [2**70 + 1, 2]])
    assert matrix.dtype == object
    assert Row("x", "<=", matrix, 2**71).total((0, 0)) == 2**71 + 1
    assert integer_matrix([[1, 2]]).dtype == np.int64


def test_64_bits_that_sums_could_pass_become_exact() -> None:
    usage = np.full((4, 1), 2**61)
    row = Row("x", "<=", usage, 2**63)
    assert row.total((0, 0, 0, 0)) == 2**63
    assert row.holds((0, 0, 0, 0))


def test_arrays_must_fit_together() -> None:
    with pytest.raises(ProblemError, match="shape"):
        Problem(np.zeros((2, 2)), (Row("x", "<=", np.zeros((1, 2), dtype=np.int64), 1),))
    with pytest.raises(ProblemError, match="finite or NaN"):
        Problem(np.array([[np.inf]]))
    with pytest.raises(ProblemError, match=r"Got -inf for up x w4\. Measure it again"):
        Problem(np.array([[0.0, 1.0], [np.nan, -np.inf]]), groups=("q", "up"), schemes=("w2", "w4"))
    with pytest.raises(ProblemError, match="not empty"):
        Problem(np.zeros((0, 3)))


def test_arrays_are_read_only() -> None:
    problem = Problem(np.zeros((1, 1)), (Row("x", "<=", np.zeros((1, 1), dtype=np.int64), 1),))
    with pytest.raises(ValueError, match="read-only"):
        problem.costs[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        problem.rows[0].usage[0, 0] = 1


def test_only_a_closed_gap_is_optimal() -> None:
    problem = Problem(np.array([[1.0, np.nan]]))
    assert answered(problem, (0,), 1.0 - 1e-10, 1e-9).status is Status.OPTIMAL
    assert answered(problem, (0,), 1.0 - 1e-8, 1e-9).status is Status.FEASIBLE
    assert answered(problem, (0,), -5.0, 0.0, proven=True).gap == 0.0
    assert not problem.feasible((1,))
    assert Row("x", "<=", np.array([[3]]), 7, Fraction(1, 2)).unit == Fraction(1, 2)
