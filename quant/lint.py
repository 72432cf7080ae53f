"""Whether a runtime can run a plan, and what a runtime leaves to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quant.kv_cache import Caches, cache_faults, cache_type_of, is_cache
from quant.layers import Inventory, Layer
from quant.plan import Plan
from quant.runtime_rules import Runtime, Target, planned_target, target_of
from quant.schemes import Scheme, parse_scheme


class RuntimeRefuses(ValueError):  # noqa: N818 - named after what went wrong
    """A request that no plan of the runtime can answer."""


@dataclass(frozen=True)
class Violation:
    """One layer of a plan that a runtime cannot run, and the rule it breaks, in words."""

    layer: str
    rule: str

    def as_json(self) -> dict[str, str]:
        """Plain values."""
        return {"layer": self.layer, "rule": self.rule}


def lint(plan: Plan, runtime: Runtime) -> tuple[Violation, ...]:
    """Every violation of a plan; none means that the runtime runs it."""
    found = []
    for name, layer in plan.layers.items():
        rule = runtime.refuses(planned_target(name, layer), parse_scheme(layer.scheme))
        if rule is not None:
            found.append(Violation(name, rule))
    return (*found, *_disagreements(plan.weights, runtime), *_cache_faults(plan.kv_cache or {}, runtime))


def _cache_faults(caches: Mapping[str, str], runtime: Runtime) -> Iterator[Violation]:
    for name, rule, step in cache_faults(caches, runtime.smaller_caches, one=runtime.one_cache):
        yield Violation(name, f"{rule}, not {caches[name]}: {step}")


def _disagreements(assignment: Mapping[str, str], runtime: Runtime) -> list[Violation]:
    found = []
    for members in fused_sets(runtime, assignment):
        first = members[0]
        for name in members[1:]:
            if assignment[name] != assignment[first]:
                rule = (
                    f"is fused with {first}, which has {assignment[first]}: it must have the same,"
                    f" not {assignment[name]}"
                )
                found.append(Violation(name, rule))
    return found


def fused_sets(runtime: Runtime, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The layers that the runtime stores as one, two or more each."""
    known = tuple(names)
    return tuple(members for fused in runtime.fused for members in fused.sets(known))


def forbidden_schemes(
    layers: Sequence[Layer], schemes: Sequence[Scheme], runtime: Runtime
) -> dict[str, tuple[str, ...]]:
    """Layer -> names of the schemes that the runtime does not run there; layers without any are left out."""
    found = {
        layer.name: tuple(s.name for s in schemes if runtime.refuses(target_of(layer), s) is not None)
        for layer in layers
    }
    return {name: refused for name, refused in found.items() if refused}


def forbidding_rules(
    layers: Sequence[Layer], schemes: Sequence[Scheme], runtime: Runtime
) -> dict[str, dict[str, list[str]]]:
    """Rule -> layer -> names of the schemes that it forbids there: `forbidden_schemes` by reason."""
    found: dict[str, dict[str, list[str]]] = {}
    for layer in layers:
        target = target_of(layer)
        for scheme in schemes:
            rule = runtime.refuses(target, scheme)
            if rule is not None:
                found.setdefault(rule, {}).setdefault(layer.name, []).append(scheme.name)
    return found


def forbidden_caches(caches: Caches, runtime: Runtime) -> dict[str, tuple[str, ...]]:
    """The same for attention layers."""
    refused = tuple(name for name in caches.schemes if not runtime.keeps(cache_type_of(name)))
    return dict.fromkeys(caches.layers, refused) if refused else {}


def require_cache_choices(caches: Caches, pins: Mapping[str, str], runtime: Runtime) -> None:
    """Raise RuntimeRefuses where a menu holds nothing that the runtime runs beside full caches, or a pin
    something that it does not run, or pins differ where all caches have one type.
    """
    smaller = [cache_type_of(name) for name in caches.menu[1:]]
    keeps = ", ".join(runtime.smaller_caches)
    if not keeps:
        raise RuntimeRefuses(
            f"{runtime.name} keeps no type of cache that can be decided. Got {', '.join(smaller)}."
            " Leave kv_cache out."
        )
    if not any(map(runtime.keeps, smaller)):
        raise RuntimeRefuses(
            f"A menu of cache types must hold one that {runtime.name} keeps: {keeps}. Got"
            f" {', '.join(smaller)}. Change the menu, or leave kv_cache out."
        )
    pinned = {name: scheme for name, scheme in pins.items() if name in caches.layers}
    for name, scheme in pinned.items():
        if not runtime.keeps(cache_type_of(scheme)):
            raise RuntimeRefuses(
                f"A pin of a cache must be full or a type that {runtime.name} keeps: {keeps}."
                f" Got {scheme} for {name}. Change the pin."
            )
    if runtime.one_cache and len(set(pinned.values())) > 1:
        shown = ", ".join(f"{name}: {scheme}" for name, scheme in pinned.items())
        raise RuntimeRefuses(
            f"All caches must have one type under {runtime.name}. Got pins to several: {shown:.300}."
            " Change the pins."
        )


def rules_below(
    layers: Sequence[Layer], schemes: Sequence[Scheme], runtime: Runtime
) -> dict[str, tuple[str, ...]]:
    """Rule -> the layers on which it forbids a scheme of fewer bytes than any that the runtime runs."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        target = target_of(layer)
        size = {s: s.storage(layer.matrix).bytes for s in schemes if s.refuses(layer) is None}
        rules = {scheme: runtime.refuses(target, scheme) for scheme in size}
        least = min((size[scheme] for scheme, rule in rules.items() if rule is None), default=0)
        for scheme, rule in rules.items():
            if rule is not None and size[scheme] < least:
                found.setdefault(rule, []).append(layer.name)
    return {rule: tuple(names) for rule, names in found.items()}


def require_choices(
    inventory: Inventory, menu: Sequence[str], pins: Mapping[str, str], runtime: Runtime
) -> None:
    """Raise RuntimeRefuses, which names layer and rule, where the runtime leaves nothing to choose.

    `pins` are by layer name; a pinned layer has its own scheme as its menu. Layers that the runtime fuses
    must share a scheme, and all take part or none.
    """
    offered = {layer.name: _left(layer, menu, pins, runtime) for layer in inventory.layers}
    excluded = [name for item in inventory.excluded for name in item.names]
    for members in fused_sets(runtime, [*offered, *excluded]):
        inside = [name for name in members if name in offered]
        outside = [name for name in members if name not in offered]
        if inside and outside:
            raise RuntimeRefuses(
                f"Layers that {runtime.name} fuses must all take part, or none. Got {inside[0]}, fused with"
                f" {outside[0]}, which keeps its precision. Exclude or include both."
            )
        if inside and not set.intersection(*(set(offered[name]) for name in inside)):
            shown = "; ".join(f"{name}: {', '.join(offered[name])}" for name in inside)
            raise RuntimeRefuses(
                f"Layers that {runtime.name} fuses must share a scheme. Got none in common: {shown}."
                " Change the menu or the pins."
            )


def _left(layer: Layer, menu: Sequence[str], pins: Mapping[str, str], runtime: Runtime) -> tuple[str, ...]:
    target = target_of(layer)
    names = (pins[layer.name],) if layer.name in pins else tuple(s for s in menu if not is_cache(s))
    faults = {name: _fault(target, parse_scheme(name), runtime) for name in names}
    left = tuple(name for name, fault in faults.items() if fault is None)
    if not left:
        kind = "pin" if layer.name in pins else "menu"
        rules = "; or ".join(dict.fromkeys(str(fault) for fault in faults.values()))
        raise RuntimeRefuses(
            f"A {kind} must hold a scheme that {runtime.name} runs on every layer. Got none for {layer.name}"
            f" ({layer.op}, {layer.matrix[0]} x {layer.matrix[1]}): {rules}."
            " Add a scheme it runs, or exclude the layer."
        )
    return left


def _fault(target: Target, scheme: Scheme, runtime: Runtime) -> str | None:
    refusal = scheme.refuses(target)
    return runtime.refuses(target, scheme) or refusal
