"""The quadratic model of a plan's divergence from sketches of the outputs' changes. Front: numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = 4096
"""So many columns are held in float64 at a time."""


def gram_matrix(sketches: NDArray[Any]) -> NDArray[np.float64]:
    """A (choices, choices) = S S' of the sketches (choices, d) that `gram_output` stores.

    The factor 1 / 2N is inside the sketches, so x'Ax estimates the divergence of the plan that picks
    the choices x. Raises ValueError for anything but a finite matrix.

    >>> gram_matrix(np.array([[1.0, 2.0], [0.0, -1.0]])).tolist()
    [[5.0, -2.0], [-2.0, 1.0]]
    """
    rows = np.asarray(sketches)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"sketches must be a finite matrix (choices, d). Got shape {rows.shape}.")
    gram = np.zeros((len(rows), len(rows)))
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS].astype(np.float64)
        gram += part @ part.T
    return gram
