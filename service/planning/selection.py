"""What patterns, pins, ties, roles and runtimes mean for the layers of an inventory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quant.kv_cache import Caches, is_cache, scheme_name, weight_schemes
from quant.layers import Inventory
from quant.lint import (
    forbidden_caches,
    forbidden_schemes,
    require_cache_choices,
    require_choices,
)
from quant.patterns import PatternError, select
from quant.runtime_rules import Runtime
from quant.runtimes import RUNTIMES
from search.budget import Limit, parse_budget
from search.compile import CompileError
from sensitivity.scorers.metric_decoupled import ROLES
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs


def missing_scores(inputs: PlanningInputs, ask: Ask, unknown: NDArray[np.bool_]) -> list[tuple[str, str]]:
    """The (layer, scheme) that a plan may choose of what is `unknown` (layers, schemes); pinned layers need
    only theirs, and what is forbidden, by the question or by its runtime, needs none.
    """
    table, forbidden = inputs.table, forbidden_of(inputs, ask)
    pinned = expand_pins(inputs.inventory, ask.pins, inputs.cache_layers)
    gaps = [
        (table.layers[i].name, table.schemes[j]) for i, j in np.argwhere(table.resources_offered() & unknown)
    ]
    return [
        (layer, scheme)
        for layer, scheme in gaps
        if scheme in ((pinned[layer],) if layer in pinned else inputs.menu)
        and scheme not in forbidden.get(layer, ())
    ]


def forbidden_of(inputs: PlanningInputs, ask: Ask) -> dict[str, tuple[str, ...]]:
    """Layer -> the schemes that the question or its runtime forbids there."""
    return forbidden_in(inputs.inventory, inputs.table.schemes, ask.runtime, inputs.caches, ask.forbid)


def forbidden_in(
    inventory: Inventory,
    schemes: Sequence[str],
    runtime: str | None,
    caches: Caches | None = None,
    forbid: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Layer -> the schemes that the runtime does not run there, where there is one, and those of `forbid`.

    Raises what `expand_forbidden` raises.
    """
    found = expand_forbidden(inventory, forbid or {}, () if caches is None else caches.layers)
    if runtime is None:
        return found
    rules = RUNTIMES[runtime]
    refused = {} if caches is None else forbidden_caches(caches, rules)
    refused |= forbidden_schemes(inventory.layers, weight_schemes(schemes), rules)
    both = {name: (*refused.get(name, ()), *found.get(name, ())) for name in {**refused, **found}}
    return {name: tuple(dict.fromkeys(names)) for name, names in both.items()}


def expand_forbidden(
    inventory: Inventory, forbid: Mapping[str, Sequence[str]], caches: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Layer -> the canonical schemes that it must not get. Names of shared tensors count for the layer that
    holds them; `caches` are attention layers, which patterns of cache schemes are about.

    Raises PatternError for a pattern that matches nothing, SchemeError for a scheme that cannot be read.
    """
    found: dict[str, dict[str, None]] = {}
    for pattern, schemes in forbid.items():
        for scheme in schemes:
            for name in _meant(inventory, pattern, scheme, caches):
                found.setdefault(name, {})[scheme_name(scheme)] = None
    return {name: tuple(names) for name, names in found.items()}


def expand_pins(inventory: Inventory, pins: Mapping[str, str], caches: Sequence[str] = ()) -> dict[str, str]:
    """Layer -> canonical scheme: a name of its own wins over patterns, a later pattern over an earlier one.

    Names of shared tensors count for the layer that holds them; `caches` are attention layers, which
    patterns of cache schemes are about. Raises PatternError for a pattern that matches nothing, SchemeError
    for a scheme that cannot be read.
    """
    found: dict[str, str] = {}
    exact = {*inventory.by_name, *caches}
    for pattern, scheme in sorted(pins.items(), key=lambda pin: pin[0] in exact):
        for name in _meant(inventory, pattern, scheme, caches):
            found[name] = scheme_name(scheme)
    return found


def _meant(inventory: Inventory, pattern: str, scheme: str, caches: Sequence[str]) -> list[str]:
    """The layers that a pattern means for a scheme of weights, the attention layers for one of caches."""
    if not is_cache(scheme):
        owners = {name: layer.name for name, layer in inventory.by_name.items()}
        return list(dict.fromkeys(owners[name] for name in select([pattern], list(owners))))
    if not caches:
        raise PatternError(
            "The scheme of a cache must be for a search that decides caches. Got"
            f" {pattern!r}: {scheme!r}. Submit one with kv_cache, or drop it."
        )
    return list(select([pattern], caches))


def pins_of(inputs: PlanningInputs, ask: Ask) -> dict[str, str]:
    """Layer -> the scheme it must get: by a pin, or because it is protected. Pins win.

    Raises PatternError or SchemeError as `expand_pins` does.
    """
    return {**protected(inputs, ask), **expand_pins(inputs.inventory, ask.pins, inputs.cache_layers)}


def scoped_limits(inventory: Inventory, ask: Ask) -> tuple[Limit, ...]:
    """The limits of roles and patterns, each about its layers. Raises BudgetError or PatternError."""
    return tuple(
        replace(limit, scope=key, layers=_scope(inventory, key))
        for key, text in ask.role_limits.items()
        for limit in parse_budget(text).limits
    )


def _scope(inventory: Inventory, key: str) -> frozenset[str]:
    if key not in ROLES:
        names = select([key], list(inventory.by_name))
        return frozenset(inventory.by_name[name].name for name in names)
    found = frozenset(layer.name for layer in inventory.layers if layer.role == key)
    if not found:
        roles = ", ".join(sorted({layer.role for layer in inventory.layers}))
        raise PatternError(f"A role must be one of the model's layers: {roles}. Got {key!r}.")
    return found


def protected(inputs: PlanningInputs, ask: Ask) -> dict[str, str]:
    """Layer -> the scheme of the menu with the most bytes that it may have, for the layers to protect."""
    if not ask.protect:
        return {}
    inventory, table = inputs.inventory, inputs.table
    names = {inventory.by_name[name].name for name in select(ask.protect, list(inventory.by_name))}
    forbidden = forbidden_of(inputs, ask)
    offered, sizes = table.resources_offered(), table.resources["bytes"]
    found = {}
    for row, layer in enumerate(table.layer_names):
        allowed = [
            column
            for column, scheme in enumerate(table.schemes)
            if offered[row, column] and scheme in inputs.menu and scheme not in forbidden.get(layer, ())
        ]
        if layer in names and allowed:
            found[layer] = table.schemes[max(allowed, key=lambda column: sizes[row][column] or 0)]
    return found


def expand_ties(
    inventory: Inventory, ties: Iterable[Sequence[str]], caches: Sequence[str] = ()
) -> tuple[tuple[str, ...], ...]:
    """Each tie as layer names, each once; weights and caches agree among themselves.

    Raises PatternError for a pattern that matches nothing, CompileError for a tie of one weight and one
    cache.
    """
    owners = {name: layer.name for name, layer in inventory.by_name.items()}
    found: list[tuple[str, ...]] = []
    for tie in ties:
        chosen = select(tie, (*owners, *caches))
        weights = tuple(dict.fromkeys(owners[name] for name in chosen if name in owners))
        attention = tuple(name for name in chosen if name in caches)
        if len(weights) == len(attention) == 1:
            raise CompileError(
                "A tie must name weights or caches, at least two of one kind. Got the weight"
                f" {weights[0]} and the cache {attention[0]}. Name layers of one kind."
            )
        found += [members for members in (weights, attention) if members]
    return tuple(found)


def require_runtime(inputs: PlanningInputs, pins: Mapping[str, str], runtime: Runtime) -> None:
    """Raises RuntimeRefuses when the runtime leaves a layer or a cache without a choice."""
    require_choices(inputs.inventory, inputs.menu, pins, runtime)
    if inputs.caches is not None:
        require_cache_choices(inputs.caches, pins, runtime)
