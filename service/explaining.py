"""Explanations and conflicts as JSON, for the API and the command alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from search.budget import BudgetError, parse_limit
from search.compile import Compiled, exact_number
from search.conflict import Conflict, Relaxed
from search.explain import Decision, Explanation, Relief, Step
from search.frontier import FrontierPoint, Stretch
from search.rate_distortion import Reference
from sensitivity.table import Fused

METHOD = "lagrangian choice, repaired and filled"
"""How the draws of the stability are solved."""


def explanation_json(found: Explanation) -> dict[str, Any]:
    """A plan explained."""
    return {
        "metric": found.metric,
        "objective": found.objective,
        "optimum": found.optimum,
        "shadow_prices": dict(found.prices),
        "excess": found.excess,
        "decisions": [_decision(one) for one in found.decisions],
        "restrictions": [_relief(one) for one in found.reliefs],
        "reference": _reference(found.reference),
        "stability": {"draws": found.draws, "method": METHOD if found.draws else None},
    }


def frontier_json(compiled: Compiled, points: Sequence[FrontierPoint]) -> dict[str, Any]:
    """Plans of a frontier with their exact resources, layers and certificates."""
    return {"items": [_point(compiled, point) for point in points]}


def stretch_json(compiled: Compiled, found: Stretch) -> dict[str, Any]:
    """The same between two totals, and where to go on if some plans are left out."""
    rest = None if found.rest is None else [exact_number(total) for total in found.rest]
    return frontier_json(compiled, found.points) | {"complete": rest is None, "next_between": rest}


def totals_between(resource: str, texts: Sequence[str]) -> tuple[Fraction, Fraction]:
    """Two totals as people write them, "1 MiB" or "2048". Raises BudgetError."""
    low, high = (parse_limit(f"{resource}<={text}").value for text in texts)
    if low > high:
        raise BudgetError(f"The first total must not be above the second one. Got {', '.join(texts)}.")
    return low, high


def fused_json(compiled: Compiled, fused: Sequence[Fused]) -> list[dict[str, Any]]:
    """The fused candidates of a plan: the layers of each, their scheme, and all that it counts with."""
    table = compiled.table
    return [
        {
            "layers": list(one.layers),
            "scheme": one.scheme,
            "metrics": {
                name: float(score)
                for name in table.metrics
                if (score := table.fused_score(one, name)) is not None
            },
            "resources": _numbers(
                {name: Fraction(table.fused_usage(one, name) or 0) for name in table.resources}
            ),
        }
        for one in fused
    ]


def _point(compiled: Compiled, point: FrontierPoint) -> dict[str, Any]:
    assignment, fused = compiled.assignment(point.choice), compiled.fused(point.choice)
    return {
        "objective": point.objective,
        "bound": point.bound,
        "gap": point.gap,
        "price": point.price,
        "resources": _numbers(compiled.resources(assignment, fused)),
        "layers": assignment,
        **({"fused": fused_json(compiled, fused)} if compiled.covers else {}),
    }


def conflict_json(found: Conflict | None) -> dict[str, Any] | None:
    """Why nothing fits; None where that is not known."""
    if found is None:
        return None
    return {
        "members": [_relaxed(one) for one in found.members],
        "irreducible": found.irreducible,
        "smallest": found.smallest,
    }


def reference_json(found: Reference | None) -> dict[str, Any] | None:
    """The Gaussian rate-distortion reference beside a plan, without its bits by layer."""
    if found is None:
        return None
    return {
        "name": "Gaussian rate-distortion reference, not a bound",
        "objective": found.objective,
        "plan": found.plan,
        "bits_per_weight": found.bits_per_weight,
    }


def _reference(found: Reference | None) -> dict[str, Any] | None:
    whole = reference_json(found)
    return None if found is None or whole is None else {**whole, "bits": dict(found.bits)}


def _decision(one: Decision) -> dict[str, Any]:
    return {
        "layers": list(one.layers),
        "scheme": one.scheme,
        "objective": one.objective,
        "up": _step(one.up),
        "down": _step(one.down),
        "alternative": one.alternative,
        "margin": one.margin,
        "stability": one.stability,
    }


def _step(one: Step | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {"scheme": one.scheme, "loss": one.loss, "resources": _numbers(one.resources)}


def _relief(one: Relief) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "name": one.name,
        "objective_without": one.objective,
        "share": one.share,
        "unscored": one.unscored,
    }


def _relaxed(one: Relaxed) -> dict[str, Any]:
    numbers = {"limit": one.limit, "least": one.least} if one.kind == "limit" else {}
    return {
        "kind": one.kind,
        "name": one.name,
        "fits": one.fits,
        **{name: None if value is None else exact_number(value) for name, value in numbers.items()},
        "objective": one.objective,
    }


def _numbers(values: Mapping[str, Fraction]) -> dict[str, int | float]:
    return {name: exact_number(value) for name, value in values.items()}
