from __future__ import annotations

import numpy as np
import pytest

from sensitivity.gram import gram_matrix


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
