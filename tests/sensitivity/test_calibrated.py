"""Cheap scores in the unit of an expensive metric, with an honest spread."""

from __future__ import annotations

import numpy as np
import pytest

from sensitivity.calibrated import FIRST_SPREAD, LEAST_SPREAD, calibrated


def tables(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(cheap, expensive) of 20 layers x 5 schemes: layers' own factors, a power law, noise."""
    generator = np.random.default_rng(seed)
    cheap = np.exp(generator.normal(0, 2, (20, 5)))
    offsets = generator.normal(0, 0.3, (20, 1))
    return cheap, np.exp(offsets + 1.1 * np.log(cheap) + 0.7 + generator.normal(0, noise, (20, 5)))


def some(expensive: np.ndarray, share: float, seed: int = 1) -> np.ndarray:
    hidden = np.random.default_rng(seed).random(expensive.shape) > share
    return np.where(hidden, np.nan, expensive)


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_the_spread_covers_the_cells_that_were_not_measured(noise: float) -> None:
    cheap, expensive = tables(noise)
    found = calibrated(cheap, some(expensive, 0.5))
    inside = (found.low <= expensive) & (expensive <= found.high)
    assert inside[~found.measured].mean() > 0.9
    assert found.spread < np.exp(8 * noise)
    assert (found.values[found.measured] == expensive[found.measured]).all()
    off = np.abs(np.log(found.values / expensive))[~found.measured].mean()
    assert off < np.abs(np.log(cheap / expensive))[~found.measured].mean() / 2


def test_nothing_measured_and_everything_measured() -> None:
    cheap, expensive = tables(0.1)
    blank = calibrated(cheap, np.full_like(expensive, np.nan))
    assert (blank.values == cheap).all()
    assert blank.spread == FIRST_SPREAD
    full = calibrated(cheap, expensive)
    assert (full.values == expensive).all()
    assert (full.low == expensive).all()
    assert (full.high == expensive).all()


def test_a_fixed_ratio_is_found_and_leaves_hardly_any_spread() -> None:
    cheap, _ = tables(0.1)
    found = calibrated(cheap, some(3 * cheap, 0.4))
    np.testing.assert_allclose(found.values, 3 * cheap, rtol=1e-9)
    assert found.spread == LEAST_SPREAD


def test_zeros_negatives_and_cells_that_are_not_offered() -> None:
    cheap = np.array([[1.0, 0.0, np.nan], [2.0, 1.0, 0.5]])
    expensive = np.array([[2.0, np.nan, np.nan], [-1.0, np.nan, 1.0]])
    found = calibrated(cheap, expensive)
    assert np.isnan(found.values[0, 2])
    assert found.values[0, 1] == 0
    assert found.values[1, 0] == -1
    assert found.values[1, 1] == pytest.approx(2.0)
    assert (found.low <= found.high)[~np.isnan(found.values)].all()
