"""Taking a layer a few rows at a time, each with the statistics of its own inputs."""

from __future__ import annotations

from collections.abc import Iterator

FEW = 1 << 16
"""Weights that are taken at once; more where a sixteenth of the matrix is more."""
SHARE = 16


def runs(
    rows: int, columns: int, groups: int, *, few: int | None = None, share: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Runs of rows with the groups of inputs they belong to: many whole groups, or a part of one.

    `few` and `share` say otherwise than FEW and SHARE.
    """
    height = rows // groups
    most = max(1, (few or FEW) // columns, rows // (share or SHARE))
    for first in range(0, groups, max(1, most // height)):
        last = min(groups, first + max(1, most // height))
        step = height * (last - first) if last - first > 1 else min(most, height)
        for at in range(first * height, last * height, step):
            yield slice(at, min(at + step, last * height)), slice(first, last)
