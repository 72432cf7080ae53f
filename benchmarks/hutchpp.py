"""Hutch++, which our metrics do not use: docs/decisions/trace-estimators.md says why."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sensitivity.estimators import Estimate, Operator, mean_estimate, quadratic_forms


def hutchpp(operator: Operator, sketch: NDArray[np.float64], probes: NDArray[np.float64]) -> Estimate:
    """Trace by Hutch++: exact on the range of A `sketch` (k, n), Hutchinson with `probes` (m, n) on the rest.

    Takes 2k + m products and is unbiased; the standard error is that of the rest. Source: Meyer, Musco,
    Musco and Woodruff 2021, arXiv:2010.09649.

    >>> hutchpp(lambda rows: rows @ np.diag([1.0, 2.0]), np.eye(2), np.array([[1.0, 1.0], [1.0, -1.0]])).value
    3.0
    """
    basis, _ = np.linalg.qr(operator(sketch).T)
    inside = float((basis * operator(basis.T).T).sum())
    rest = probes - (probes @ basis) @ basis.T
    return mean_estimate(inside + quadratic_forms(operator, rest))
