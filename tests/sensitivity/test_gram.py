from __future__ import annotations

import numpy as np
import pytest

from sensitivity.gram import gram_matrix, plan_stability


def test_gram_matrix_is_symmetric_and_positive() -> None:
    sketches = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    matrix = gram_matrix(sketches)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0


@pytest.mark.parametrize("sketches", [np.zeros(3), np.array([[np.nan, 1.0]])])
def test_bad_sketches_are_refused(sketches: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite matrix"):
        gram_matrix(sketches)


def test_halves_of_the_draws_that_agree_are_stable() -> None:
    """Equal halves rank alike, opposite ones not at all; where all plans are alike there is nothing to rank."""
    chance = np.random.default_rng(0)
    half = chance.gamma(1, 1, (3, 4, 5, 2))
    assert plan_stability(np.repeat(half, 2, axis=1), 0) == pytest.approx(1.0)
    sizes = chance.gamma(1, 1, (5, 2))
    against = np.stack([sizes, sizes.max() - sizes] * 2)[None]
    assert plan_stability(against, 0) == 0.0
    assert plan_stability(np.ones((3, 4, 5, 2)), 0) == 1.0
    assert plan_stability(np.stack([np.ones((5, 2)), sizes] * 2)[None], 0) == 0.0
