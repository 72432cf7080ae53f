"""Whether a runtime can run a plan, and what a runtime leaves to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    return (*found, *_disagreements(plan.assignment, runtime))


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
    names = (pins[layer.name],) if layer.name in pins else tuple(menu)
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
