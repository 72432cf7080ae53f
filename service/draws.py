"""The independent values behind stored scores: samples or probes, the same for every scheme of a layer.

Scores of single choices keep them with their unit; those of block metrics with the unit that `combined` made
of the blocks. No torch, no database: who reads says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.digest import digest
from sensitivity.evidence import mean_interval
from sensitivity.units import ScoreRow, draws_name
from service.records import ScoreRecord, UnitRecord

COMBINED = "combined"
KEPT = 256
"""So many units and arrays are held at a time."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Combined:
    """The rows of a block metric as one unit: `arrays[str(i)]` (n, schemes) are the draws of layer i."""

    metric: str
    layers: tuple[str, ...]
    schemes: tuple[str, ...]
    arrays: Mapping[str, Floats]

    @property
    def key(self) -> str:
        """Stable and unique among units; layers and schemes enter as a digest."""
        return f"{COMBINED}:{self.metric}:{digest([list(self.layers), list(self.schemes)])[:32]}"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, by which the arrays are read."""
        lists = {"layers": list(self.layers), "schemes": list(self.schemes)}
        return {"unit": COMBINED, "metric": self.metric, **lists}


def combined(metric: str, rows: Sequence[ScoreRow]) -> Combined:
    """What is stored of a block metric's rows, which are complete over their layers and schemes."""
    layers = tuple(dict.fromkeys(row.layer for row in rows))
    schemes = tuple(dict.fromkeys(row.scheme for row in rows))
    cells = {(row.layer, row.scheme): row.draws for row in rows}
    arrays = {}
    for position, layer in enumerate(layers):
        columns = [cells.get((layer, scheme)) for scheme in schemes]
        found = [column for column in columns if column is not None]
        if found:
            blank = np.full(len(found[0]), np.nan)
            arrays[str(position)] = np.stack([blank if c is None else c for c in columns], axis=1)
    return Combined(metric, layers, schemes, arrays)


class Draws:
    """Finds the draws of scores. `unit` gives a stored unit by its key, `array` one array of an artifact."""

    def __init__(
        self,
        unit: Callable[[str], UnitRecord | None],
        array: Callable[[str, str], NDArray[Any] | None],
    ) -> None:
        self._unit = lru_cache(KEPT)(unit)
        self._array = lru_cache(KEPT)(array)

    def of(self, score: ScoreRecord) -> Floats | None:
        """The draws (n,) of one score; None where none were kept."""
        unit = self._unit(score.unit_key)
        if unit is None or unit.artifact is None:
            return None
        if unit.kind != COMBINED:
            return self._array(unit.artifact, draws_name(score.metric))
        layers, schemes = unit.unit["layers"], unit.unit["schemes"]
        found = self._array(unit.artifact, str(layers.index(score.layer)))
        return None if found is None else np.asarray(found[:, schemes.index(score.scheme)])

    def difference(self, score: ScoreRecord, other: ScoreRecord) -> tuple[float, float | None]:
        """`score` less `other`, of one layer and metric, with the standard error over paired draws."""
        one, two = self.of(score), self.of(other)
        paired = one is not None and two is not None and len(one) == len(two) > 1
        stderr = mean_interval(one - two).stderr if paired else None  # type: ignore[operator]
        return score.value - other.value, stderr
