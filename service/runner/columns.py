"""Blocks of metrics that judge every (layer, scheme) alone: what is stored of a block, and what is missing.

A menu with a new scheme, or a new layer, asks for other blocks than the ones that are stored; most of their
cells are stored all the same. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensitivity.units import BlockUnit

Arrays = Mapping[str, NDArray[Any]]
Cell = tuple[str, str]


@dataclass(frozen=True)
class Stored:
    """A finished block and the digest of its arrays, whose last sides are its layers and its schemes."""

    unit: BlockUnit
    artifact: str

    @property
    def cells(self) -> set[Cell]:
        """The (layer, scheme) pairs it holds."""
        return {(layer, scheme) for layer in self.unit.layers for scheme in self.unit.schemes}


def missing_part(wanted: BlockUnit, stored: Sequence[Stored]) -> BlockUnit | None:
    """The layers and schemes of a block that are still to be measured, None where nothing is."""
    known: set[Cell] = set().union(*(found.cells for found in matching(wanted, stored)))
    lacking = [cell for layer in wanted.layers for s in wanted.schemes if (cell := (layer, s)) not in known]
    layers, schemes = {layer for layer, _ in lacking}, {scheme for _, scheme in lacking}
    if not lacking:
        return None
    return replace(
        wanted,
        layers=tuple(name for name in wanted.layers if name in layers),
        schemes=tuple(name for name in wanted.schemes if name in schemes),
    )


def matching(wanted: BlockUnit, stored: Sequence[Stored]) -> list[Stored]:
    """The stored blocks of the same metric and samples."""
    return [one for one in stored if (one.unit.metric, one.unit.block) == (wanted.metric, wanted.block)]


def joined(wanted: BlockUnit, parts: Sequence[tuple[BlockUnit, Arrays]]) -> dict[str, NDArray[Any]]:
    """The arrays of a block from blocks that together hold all its cells, the first that holds one counts.

    >>> x, y = (BlockUnit("m", "b", (scheme,), ("l",)) for scheme in "xy")
    >>> parts = [(x, {"values": np.array([[[5]]])}), (y, {"values": np.array([[[7]]])})]
    >>> joined(BlockUnit("m", "b", ("y", "x"), ("l",)), parts)["values"].tolist()
    [[[7, 5]]]
    """
    found: dict[str, NDArray[Any]] = {}
    shape = (len(wanted.layers), len(wanted.schemes))
    for unit, arrays in reversed(parts):
        rows = [(i, wanted.layers.index(n)) for i, n in enumerate(unit.layers) if n in wanted.layers]
        columns = [(j, wanted.schemes.index(n)) for j, n in enumerate(unit.schemes) if n in wanted.schemes]
        if not rows or not columns:
            continue
        from_rows, to_rows = zip(*rows, strict=True)
        from_columns, to_columns = zip(*columns, strict=True)
        for name, values in arrays.items():
            own = found.setdefault(name, np.zeros((*values.shape[:-2], *shape), values.dtype))
            own[..., np.array(to_rows)[:, None], to_columns] = values[
                ..., np.array(from_rows)[:, None], from_columns
            ]
    return found
