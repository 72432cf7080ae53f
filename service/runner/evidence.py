"""Evidence: the plan and its rivals on the reporting part, which neither scored nor chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.layers import DTYPE_BITS
from search.compile import Assignment
from sensitivity.evidence import MeasuredPlan, evidence_document
from service.planning import Ask, PlanningInputs, compile_ask
from service.runner.lab import Lab
from service.runner.rivals import fits, uniform_assignments
from service.states import Stage

PLAN = "plan"


def measured_evidence(
    lab: Lab,
    inputs: PlanningInputs,
    ask: Ask,
    plan: Assignment,
    inspection: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure `plan`, every uniform scheme and full precision; the document that a plan resource shows."""
    compiled = compile_ask(inputs, ask)
    named = {PLAN: plan, **uniform_assignments(inputs, ask.pins)}
    full, *results = lab.quality([{}, *named.values()], "reporting", Stage.MEASURING)
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


def _full_precision_size(inputs: PlanningInputs) -> dict[str, Any]:
    layers = inputs.inventory.layers
    bits = sum(layer.parameters * DTYPE_BITS[layer.dtype] for layer in layers)
    return {
        "bytes": sum(layer.stored_bytes for layer in layers),
        "bits_per_weight": bits / inputs.inventory.parameters,
    }
