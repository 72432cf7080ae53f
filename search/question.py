"""A question to a score table, in parts that can be left out one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from search.budget import Limit
from search.compile import Compiled, compile_problem
from sensitivity.table import ScoreTable

RestrictionKind = Literal["tie", "pin", "forbid", "protect", "rule"]


@dataclass(frozen=True, eq=False)
class Restriction:
    """Something besides limits that a plan must keep: a tie, a pin, forbidden schemes, protected layers, a
    rule of a runtime.

    `name` tells people which. `forbidden` are schemes by layer; `unscored` counts those of them that have no
    score, so that nobody knows what allowing them would bring.
    """

    kind: RestrictionKind
    name: str
    ties: tuple[tuple[str, ...], ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    forbidden: Mapping[str, Collection[str]] = field(default_factory=dict)
    unscored: int = 0


@dataclass(frozen=True, eq=False)
class Question:
    """What a plan is asked of: a metric of a table under limits and restrictions.

    Of two pins of a layer the later restriction's wins, and the earlier one loses that layer. `schemes` are
    what free layers may get; None is all.
    """

    table: ScoreTable
    metric: str | None = None
    limits: tuple[Limit, ...] = ()
    restrictions: tuple[Restriction, ...] = ()
    schemes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        taken: set[str] = set()
        kept = []
        for one in reversed(self.restrictions):
            own = {layer: scheme for layer, scheme in one.pins.items() if layer not in taken}
            taken |= own.keys()
            kept.append(one if len(own) == len(one.pins) else replace(one, pins=own))
        object.__setattr__(self, "restrictions", tuple(reversed(kept)))

    def compiled(self, without: Collection[Restriction] = ()) -> Compiled:
        """The problem, with some restrictions left out. Raises CompileError or BudgetError."""
        return self._whole if not without else self._compiled(without)

    @cached_property
    def _whole(self) -> Compiled:
        return self._compiled(())

    def _compiled(self, without: Collection[Restriction]) -> Compiled:
        kept = [one for one in self.restrictions if one not in without]
        forbidden: dict[str, set[str]] = {}
        for one in kept:
            for layer, names in one.forbidden.items():
                forbidden.setdefault(layer, set()).update(names)
        return compile_problem(
            self.table,
            metric=self.metric,
            limits=self.limits,
            ties=[tie for one in kept for tie in one.ties],
            pins={layer: scheme for one in kept for layer, scheme in one.pins.items()},
            schemes=self.schemes,
            forbidden=forbidden,
        )


def ungrouped(table: ScoreTable) -> tuple[ScoreTable, tuple[Restriction, ...]]:
    """A table without its groups, and the groups as ties that can be left out."""
    members: dict[str, list[str]] = {}
    for layer in table.layers:
        if layer.group is not None:
            members.setdefault(layer.group, []).append(layer.name)
    ties = tuple(
        Restriction("tie", f"group {name}", ties=(tuple(layers),))
        for name, layers in members.items()
        if len(layers) > 1
    )
    return replace(table, layers=tuple(replace(layer, group=None) for layer in table.layers)), ties
