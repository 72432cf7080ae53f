"""Plans and their deployments for tests of exports and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from quant.checkpoints.source import Source
from quant.export.protocol import Deployment, ModelFacts
from quant.layers import Inventory
from quant.plan import Certificate, Digests, Plan
from quant.planning import build_plan

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
FUSED |= dict.fromkeys(("query", "key", "value"), "qkv")
"""Last part of a path -> the matrix that serving runtimes join it into."""


def plan_of(inventory: Inventory, assignment: Mapping[str, Any], **digests: Any) -> Plan:
    """A plan of schemes by layer."""
    return build_plan(
        inventory,
        assignment,
        digests=Digests(**digests),
        certificate=Certificate("feasible"),
        source="test",
    )


def deployment_of(
    source: Source,
    inventory: Inventory,
    assignment: Mapping[str, Any],
    every: Inventory | None = None,
    **digests: Any,
) -> Deployment:
    """That plan for the source's own model, of which `every` knows more modules than take part."""
    plan = plan_of(inventory, assignment, **{"model": source.digest, **digests})
    return Deployment(plan, ModelFacts.of(every or inventory, source.config))


def alike(names: Iterable[str], choose: Callable[[], Any]) -> dict[str, Any]:
    """Layer -> what `choose` drew for it and all that is fused with it."""
    found: dict[str, Any] = {}
    drawn: dict[tuple[str, str], Any] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        key = (parent, FUSED.get(last, last))
        if key not in drawn:
            drawn[key] = choose()
        found[name] = drawn[key]
    return found
