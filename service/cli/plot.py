"""A plot in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 64, 14
LOG_SPAN = 30.0
"""Positive values that span more than this factor are drawn by their logarithm."""


def plot(dots: Sequence[tuple[float, float]], across: str, up: str) -> str:
    """Dots (x, y) on a grid with the ends of both axes; y by its logarithm where it spans much.

    >>> print(plot([(0, 4), (5, 2), (10, 1)], "bytes", "loss").splitlines()[1].strip())
    4 |*
    """
    xs, ys = [x for x, _ in dots], [y for _, y in dots]
    logarithmic = min(ys) > 0 and max(ys) > LOG_SPAN * min(ys)
    heights = [math.log(y) for y in ys] if logarithmic else ys
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for x, height in zip(xs, heights, strict=True):
        grid[HEIGHT - 1 - _cell(height, heights, HEIGHT)][_cell(x, xs, WIDTH)] = "*"
    labels = {0: f"{max(ys):.4g}", HEIGHT - 1: f"{min(ys):.4g}"}
    margin = max(map(len, labels.values()))
    lines = [f"{labels.get(row, ''):>{margin}} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    left, right = f"{min(xs):,.10g}", f"{max(xs):,.10g}"
    ends = f"{left}{across:^{max(1, WIDTH - len(left) - len(right))}}{right}"
    title = f"{up}{', logarithmic' if logarithmic else ''}"
    return "\n".join((title, *lines, f"{'':>{margin}} +{'-' * WIDTH}", f"{'':>{margin}}  {ends}"))


def _cell(value: float, values: Sequence[float], count: int) -> int:
    low, high = min(values), max(values)
    return 0 if high == low else round((value - low) / (high - low) * (count - 1))
