from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.hutchpp import hutchpp
from sensitivity.estimators import (
    Estimate,
    Stratum,
    keyed_generator,
    mean_estimate,
    quadratic_forms,
    rademacher,
    stratified,
    xtrace_draws,
    xtrace_estimate,
)

SIZE = 40
SPECTRA = {
    "decaying": 0.6 ** np.arange(SIZE),
    "flat": np.ones(SIZE) + 0.2 * np.cos(np.arange(SIZE)),
    "indefinite": np.where(np.arange(SIZE) % 3, 1.0, -1.0) * 0.8 ** np.arange(SIZE),
}


def symmetric(size: int, seed: int) -> np.ndarray:
    square = np.random.default_rng(seed).standard_normal((size, size))
    return square + square.T


def with_spectrum(values: np.ndarray, seed: int) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (basis * values) @ basis.T


def signs(count: int, draw: int) -> np.ndarray:
    return np.stack([rademacher(SIZE, ("signs", draw, index)) for index in range(count)])


def hutchinson(matrix: np.ndarray, probes: np.ndarray) -> Estimate:
    return mean_estimate(quadratic_forms(lambda rows: rows @ matrix, probes))


def xtrace(matrix: np.ndarray, probes: np.ndarray) -> Estimate:
    return xtrace_estimate(xtrace_draws(lambda rows: rows @ matrix, probes)[0])


def naive_xtrace(matrix: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """Draw i by the textbook: leave probe i out, find the range of the rest, use i on what is left."""
    draws = []
    for i, probe in enumerate(probes):
        basis, _ = np.linalg.qr(matrix @ np.delete(probes, i, axis=0).T)
        rest = probe - basis @ (basis.T @ probe)
        draws.append(np.trace(basis.T @ matrix @ basis) + rest @ matrix @ rest)
    return np.array(draws)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_xtrace_is_the_textbooks_with_two_products_per_probe(spectrum: str) -> None:
    matrix, probes, used = with_spectrum(SPECTRA[spectrum], 1), signs(5, 0), []

    def operator(rows: np.ndarray) -> np.ndarray:
        used.append(len(rows))
        return rows @ matrix

    draws, forms = xtrace_draws(operator, probes)
    np.testing.assert_allclose(draws, naive_xtrace(matrix, probes), rtol=1e-9)
    np.testing.assert_allclose(forms, np.einsum("ij,jk,ik->i", probes, matrix, probes))
    assert sum(used) == 10


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["hutchinson", "hutchpp", "xtrace"])
def test_estimators_are_unbiased_and_their_errors_honest(name: str, spectrum: str) -> None:
    """Over 400 runs of 12 products: no bias, and the stated variance is the spread's, within a half."""
    matrix = with_spectrum(SPECTRA[spectrum], 2)

    def run(draw: int) -> Estimate:
        probes = signs(12, draw)
        if name == "hutchinson":
            return hutchinson(matrix, probes)
        if name == "hutchpp":
            return hutchpp(lambda rows: rows @ matrix, probes[:4], probes[4:8])
        return xtrace(matrix, probes[:6])

    found = [run(draw) for draw in range(400)]
    values = np.array([estimate.value for estimate in found])
    stated = np.mean([estimate.stderr**2 for estimate in found])
    assert values.mean() == pytest.approx(np.trace(matrix), abs=4 * values.std() / 20)
    assert 0.5 < stated / values.var() < 2


def test_the_range_pays_where_the_spectrum_decays_and_costs_where_it_is_flat() -> None:
    """At twelve products each; this is why a layer's own products choose."""

    def spread(spectrum: str, *, by_xtrace: bool) -> float:
        matrix = with_spectrum(SPECTRA[spectrum], 3)
        found = [
            xtrace(matrix, signs(6, draw)) if by_xtrace else hutchinson(matrix, signs(12, draw))
            for draw in range(100)
        ]
        return float(np.std([estimate.value for estimate in found]))

    assert spread("decaying", by_xtrace=True) < 0.5 * spread("decaying", by_xtrace=False)
    assert spread("flat", by_xtrace=True) > 1.1 * spread("flat", by_xtrace=False)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_low_rank_is_found_exactly(rank: int) -> None:
    matrix = with_spectrum(np.where(np.arange(SIZE) < rank, 2.0, 0.0), 4)
    estimate = xtrace(matrix, signs(5, 1))
    assert estimate.value == pytest.approx(2.0 * rank, abs=1e-9)
    assert estimate.stderr == pytest.approx(0.0, abs=1e-9)


def test_strata_that_were_not_met_widen_the_error() -> None:
    parts = [Stratum(1.0, 1.0, 0.0), Stratum(1.0, 3.0, 0.0)]
    assert stratified(parts, 2, 4) == Estimate(2.0, 0.0, 4)
    assert stratified(parts, 4, 4) == Estimate(2.0, 0.5**0.5, 4)
    assert stratified(parts[:1], 4, 4).stderr == math.inf


def test_hutchinson_is_unbiased_with_the_textbook_variance() -> None:
    matrix = symmetric(12, 0)
    probes = np.stack([rademacher(12, ("test", index)) for index in range(20000)])
    estimate = hutchinson(matrix, probes)
    variance = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    assert estimate.stderr**2 * estimate.n == pytest.approx(variance, rel=0.05)
    assert estimate.value == pytest.approx(np.trace(matrix), abs=4 * estimate.stderr)


def test_a_diagonal_matrix_needs_one_probe() -> None:
    estimate = hutchinson(np.diag(np.arange(5.0)), np.ones((1, 5)))
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
