"""What plans are made from, whatever the budget: a table of scores and exact resources."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.costs import Latency, resources
from quant.kv_cache import Caches, extended, weight_schemes
from quant.layers import Inventory
from quant.plan import Calibration, Digests
from sensitivity.catalog import SCORERS
from sensitivity.contexts import without_context
from sensitivity.table import MetricTable, ScoreTable, TableLayer
from sensitivity.units import ScoreRow
from service.costing import Costs
from service.deciding import Deciding
from service.records import ScoreRecord


class ScoresMissing(ValueError):  # noqa: N818 - named after what went wrong
    """Some (layer, scheme) of the menu has no score in the metric that decides."""


CACHE_ROLE = "kv_cache"


@dataclass(frozen=True, eq=False)
class PlanningInputs:
    """What does not depend on the budget. `menu` are the schemes a free layer may get; pins may name more.
    `sources` says where latency and energy came from, `calibration` how the data were read,
    `corrections` what plans change beside weights, `deciding` what the scores are, `caches` the attention
    layers that are decided too; their schemes are in `menu` after those of weights; `calibrated` a metric
    that was measured only near decisions -> the one that stands for it elsewhere; `unpaired` (layers,
    schemes) what has no interactions though the table has some, None where that is nothing; `origin` the
    repository, commit and folder of a hub's model.
    """

    inventory: Inventory
    table: ScoreTable
    menu: tuple[str, ...]
    digests: Digests = field(default_factory=Digests)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Calibration | None = None
    corrections: tuple[str, ...] = ()
    deciding: Deciding | None = None
    caches: Caches | None = None
    calibrated: Mapping[str, str] = field(default_factory=dict)
    unpaired: NDArray[np.bool_] | None = None
    origin: Mapping[str, Any] | None = None

    @property
    def cache_layers(self) -> tuple[str, ...]:
        """The attention layers that are decided."""
        return () if self.caches is None else self.caches.layers


def score_table(
    inventory: Inventory,
    schemes: Sequence[str],
    scores: Iterable[ScoreRow | ScoreRecord],
    metrics: Collection[str],
    latency: Latency | None = None,
    costs: Costs | None = None,
    deciding: Deciding | None = None,
    caches: Caches | None = None,
) -> ScoreTable:
    """Layers x schemes with every score and exact resource; NaN where there is no score.

    `costs` brings latency, energy and memory; `latency` is short for a table alone. `schemes` are the menu
    and the schemes that pins name; those of `caches` come after them, as attention layers do after the
    others. Scores of other layers, schemes and metrics are passed over; those of metric_decoupled and those
    over contexts are made as `deciding` says. Raises CostError when a table lacks
    a cell.
    """
    found = costs or Costs(latency)
    parsed = weight_schemes(schemes)
    names = tuple(scheme.name for scheme in parsed) + (() if caches is None else caches.schemes)
    layers = tuple(
        TableLayer(layer.name, layer.parameters, layer.macs, None, layer.role) for layer in inventory.layers
    ) + (() if caches is None else _cache_rows(caches))
    row = {layer.name: position for position, layer in enumerate(layers)}
    column = {name: position for position, name in enumerate(names)}
    values = {metric: np.full((len(row), len(column)), np.nan) for metric in metrics}
    stderr = {metric: np.full((len(row), len(column)), np.nan) for metric in metrics}
    known = [score for score in scores if score.layer in row and score.scheme in column]
    for score in known if deciding is None else deciding.rows(known):
        if score.metric in values:
            cell = row[score.layer], column[score.scheme]
            values[score.metric][cell] = score.value
            stderr[score.metric][cell] = np.nan if score.stderr is None else score.stderr
    used = resources(inventory.layers, parsed, found.latency, found.energy)
    if caches is not None:
        used = {name: extended(grid, caches.nothing) for name, grid in used.items()}
    return ScoreTable(
        layers,
        names,
        {
            name: MetricTable(SCORERS[without_context(name)].direction, values[name], stderr[name])
            for name in metrics
        },
        {**used, **found.resources},
    )


def _cache_rows(caches: Caches) -> tuple[TableLayer, ...]:
    return tuple(TableLayer(name, 0, None, None, CACHE_ROLE, caches.menu[0]) for name in caches.layers)


def table_schemes(menu: Sequence[str], pins: Mapping[str, str]) -> tuple[str, ...]:
    """The menu and then the schemes that only pins name, in canonical spelling, each once; without those of
    caches.

    >>> table_schemes(["w2", "w4-channel"], {"lm_head": "w8", "a": "w2", "b.attn": "kv-int8"})
    ('w2', 'w4', 'w8')
    """
    return tuple(dict.fromkeys(scheme.name for scheme in weight_schemes((*menu, *pins.values()))))


def planning_menu(menu: Sequence[str], caches: Caches | None) -> tuple[str, ...]:
    """What free layers may get: the schemes of a request, and those of caches."""
    return table_schemes(menu, {}) + (() if caches is None else caches.menu)
