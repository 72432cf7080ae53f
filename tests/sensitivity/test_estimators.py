from __future__ import annotations

import math

import numpy as np
import pytest

from sensitivity.estimators import Estimate, hutchinson, keyed_generator, mean_estimate, rademacher


def symmetric(size: int, seed: int) -> np.ndarray:
    square = np.random.default_rng(seed).standard_normal((size, size))
    return square + square.T


def test_hutchinson_is_unbiased_with_the_textbook_variance() -> None:
    matrix = symmetric(12, 0)
    probes = np.stack([rademacher(12, ("test", index)) for index in range(20000)])
    estimate = hutchinson(lambda rows: rows @ matrix, [probes])
    variance = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    assert estimate.stderr**2 * estimate.n == pytest.approx(variance, rel=0.05)
    assert estimate.value == pytest.approx(np.trace(matrix), abs=4 * estimate.stderr)


def test_a_diagonal_matrix_needs_one_probe() -> None:
    estimate = hutchinson(lambda rows: rows * np.arange(5), [np.ones((1, 5))])
    assert estimate == Estimate(10.0, math.inf, 1)


def test_signs_depend_on_the_key_alone() -> None:
    first = rademacher(64, (0, "fc", 1))
    assert set(first) == {-1.0, 1.0}
    assert (first == rademacher(64, (0, "fc", 1))).all()
    for other in ((1, "fc", 1), (0, "fd", 1), (0, "fc", 2), ("0", "fc", 1)):
        assert (first != rademacher(64, other)).any()


def test_signs_never_change() -> None:
    """Blocks of probes are stored: another stream would mix two estimates."""
    assert rademacher(12, (0, "fc", 0)).astype(int).tolist() == [1, 1, 1, 1, 1, 1, -1, 1, -1, -1, -1, 1]


def test_names_cannot_be_confused_by_joining() -> None:
    assert keyed_generator(("ab", "c")).random() != keyed_generator(("a", "bc")).random()


def test_relative_error_of_zero() -> None:
    assert mean_estimate([0.0, 0.0]).relative_error == 0.0
    assert mean_estimate([1.0, -1.0]).relative_error == math.inf
    assert mean_estimate([-2.0, -4.0]).relative_error == pytest.approx(1 / 3)


@pytest.mark.parametrize("draws", [[], [[1.0]]])
def test_bad_draws_are_refused(draws: list[float]) -> None:
    with pytest.raises(ValueError, match="vector that is not empty"):
        mean_estimate(draws)
