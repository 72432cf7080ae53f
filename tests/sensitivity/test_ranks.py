"""Rank correlations against their definitions, intervals that cover, and reliability that is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import kendalltau

from sensitivity.ranks import _kendall, rank_correlation, split_half, stepped_up


def naive_ranks(values: list[float]) -> list[float]:
    """1 for the least; ties share the mean of their places."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def naive_spearman(x: list[float], y: list[float]) -> float:
    return float(np.corrcoef(naive_ranks(x), naive_ranks(y))[0, 1])


def naive_tau_b(x: list[float], y: list[float]) -> float:
    """(concordant - discordant) / sqrt(pairs untied in x * pairs untied in y), Kendall 1945."""
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return float(sum(a * b for a, b in signs) / np.sqrt(untied[0] * untied[1]))


@pytest.mark.parametrize("seed", range(3))
def test_both_coefficients_are_those_of_the_definitions_with_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(0, 6, 15).astype(float).tolist()
    y = [a + b for a, b in zip(x, random.integers(0, 6, 15).astype(float), strict=True)]
    found = rank_correlation(x, y, resamples=20)
    assert found is not None
    assert found.spearman.value == pytest.approx(naive_spearman(x, y), abs=1e-12)
    assert found.kendall.value == pytest.approx(naive_tau_b(x, y), abs=1e-12)
    assert found.n == 15


def test_resampled_kendalls_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 9, (2, 12)).astype(float)
    rows = random.integers(12, size=(20, 12))
    assert _kendall(x, y, rows) == pytest.approx([kendalltau(x[row], y[row]).statistic for row in rows])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random, covered = np.random.default_rng(0), 0
    truth = 6 / np.pi * np.arcsin(0.7 / 2)  # Spearman's rho of a normal pair with correlation .7
    for seed in range(30):
        x = random.standard_normal(50)
        y = 0.7 * x + np.sqrt(1 - 0.49) * random.standard_normal(50)
        found = rank_correlation(x, y, seed=seed, resamples=100)
        assert found is not None
        assert found.spearman.low <= found.spearman.value <= found.spearman.high
        covered += found.spearman.low <= truth <= found.spearman.high
    assert covered >= 25


def test_the_seed_decides_the_interval() -> None:
    x, y = np.random.default_rng(1).random((2, 20))
    assert rank_correlation(x, y, seed=3) == rank_correlation(x, y, seed=3)
    assert rank_correlation(x, y, seed=3) != rank_correlation(x, y, seed=4)


@pytest.mark.parametrize(("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0] * 5, range(5)), (range(5), [2.0] * 5)])
def test_nothing_to_rank_is_none(x: list[float], y: list[float]) -> None:
    assert rank_correlation(x, y) is None


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the same length"):
        rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0])


def test_reliability_is_that_of_known_noise() -> None:
    """Means of n draws with variance s^2 over columns of variance 1 have reliability 1 / (1 + s^2 / n)."""
    random = np.random.default_rng(0)
    truth = random.standard_normal(400)
    draws = truth + 4.0 * random.standard_normal((16, 400))
    assert split_half(draws) == pytest.approx(1 / (1 + 16 / 16), abs=0.08)
    assert split_half(truth + 0.01 * random.standard_normal((16, 400))) == pytest.approx(1, abs=0.01)
    noise = split_half(random.standard_normal((16, 400)))
    assert noise is not None
    assert noise < 0.25


def test_split_half_leaves_out_what_is_not_offered() -> None:
    draws = np.tile([1.0, 2.0, np.nan, 3.0], (8, 1))
    assert split_half(draws) == pytest.approx(1.0)
    assert split_half(draws[:3]) is None
    assert split_half() is None
    assert split_half(draws[:, :3]) is None
    assert split_half(np.ones((8, 5))) is None


def test_matrices_are_ranked_as_one_and_split_alike_where_they_are_equally_long() -> None:
    random = np.random.default_rng(0)
    draws = random.standard_normal((12, 30)) + random.standard_normal(30)
    assert split_half(draws[:, :10], draws[:, 10:]) == pytest.approx(split_half(draws))
    shared = random.standard_normal((12, 1)) * np.arange(10)  # the order of columns is the sign of one draw
    apart = split_half(shared, shared[:11])
    assert apart is not None
    assert split_half(shared, shared) != apart
    assert split_half(draws, draws[:8, :2]) is not None


def test_half_a_correlation_is_two_thirds_of_a_reliability() -> None:
    assert stepped_up(0.5) == pytest.approx(2 / 3)
    assert stepped_up(1.0) == 1.0
