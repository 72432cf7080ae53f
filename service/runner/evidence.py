"""Evidence: the plan and its rivals on the reporting part, which neither scored nor chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.layers import DTYPE_BITS
from search.compile import Assignment, Compiled
from search.refine import Measure
from sensitivity.contexts import context_of
from sensitivity.evidence import MeasuredPlan, evidence_document
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import compile_ask
from service.runner.lab import Lab, among
from service.runner.rivals import fits, high_ends, random_rivals, uniform_assignments
from service.states import Stage

PLAN = "plan"


def measured_evidence(
    lab: Lab,
    inputs: PlanningInputs,
    ask: Ask,
    plan: Assignment,
    inspection: Mapping[str, Any],
    losses: Measure,
) -> dict[str, Any]:
    """Measure `plan`, its rivals and full precision; the document that a plan resource shows. The rivals are
    every uniform scheme, the ends at more bits, and of some random plans the best by their `losses` on the
    choosing part.

    The plan of one context is measured on the samples of that context.
    """
    compiled = compile_ask(inputs, ask)
    named = {PLAN: plan, **uniform_assignments(inputs, ask), **_heuristics(inputs, ask, compiled, losses)}
    found = lab.quality([{}, *named.values()], "reporting", Stage.MEASURING)
    context = context_of(compiled.metric)
    if context is not None and inputs.deciding is not None:
        chosen = inputs.deciding.chosen(inspection, "reporting")[context]
        found = [among(quality, chosen) for quality in found]
    full, *results = found
    entries = [
        MeasuredPlan(
            name=name,
            bytes=int(compiled.resources(assignment)["bytes"]),
            bits_per_weight=float(compiled.resources(assignment)["bits_per_weight"]),
            within_limits=fits(compiled, assignment),
            divergence=measured.per_sample,
            quality=quality,
        )
        for (name, assignment), (measured, quality) in zip(named.items(), results, strict=True)
    ]
    document = evidence_document(inspection["divergence"], entries[0], entries[1:], full[1])
    document["full_precision"] |= _full_precision_size(inputs)
    return document


def _heuristics(
    inputs: PlanningInputs, ask: Ask, compiled: Compiled, losses: Measure
) -> dict[str, Assignment]:
    found = {rival.source: dict(rival.assignment) for rival in high_ends(inputs, ask, compiled)}
    random = [dict(rival.assignment) for rival in random_rivals(compiled)]
    if random:
        means = [measured.mean for measured in losses(random)]
        found[f"best of {len(random)} random"] = random[means.index(min(means))]
    return found


def _full_precision_size(inputs: PlanningInputs) -> dict[str, Any]:
    layers = inputs.inventory.layers
    bits = sum(layer.parameters * DTYPE_BITS[layer.dtype] for layer in layers)
    return {
        "bytes": sum(layer.stored_bytes for layer in layers),
        "bits_per_weight": bits / inputs.inventory.parameters,
    }
