"""The vocabulary: what schemes, metrics, solvers and tasks there are, straight from the catalogs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from quant.activations import ACTIVATIONS
from quant.catalog import DEFAULT_QUANTIZER, QUANTIZERS
from quant.devices import DEVICES
from quant.formats import FORMATS
from quant.runtimes import RUNTIMES, default_menu
from quant.schemes import grammar, parse_scheme
from search.budget import BYTE_UNITS, EXAMPLES, TIME_UNITS
from search.catalog import SOLVERS
from search.choosers import CHOOSERS
from search.objectives.catalog import DEFAULT, OBJECTIVES
from sensitivity.catalog import SCORERS, TASKS
from service.api.context import LARGEST_PAGE, Ctx
from service.api.guarded import Guarded
from service.api.quotas import usage
from service.fields import MOST_BUDGETS, MOST_FILES, MOST_SCHEMES
from service.ingest.kinds import CALIBRATION_FILES, MODEL_FILES

router = APIRouter(prefix="/v1", tags=["catalogs"], route_class=Guarded)


@router.get("/formats")
def formats() -> dict[str, Any]:
    """Weight formats, quantizers, activation formats and the grammar of scheme names."""
    return {
        "grammar": grammar().splitlines(),
        "families": [
            {"name": family.name, "summary": family.summary, "grammar": family.grammar}
            for family in FORMATS.values()
        ],
        "quantizers": [
            {
                "name": entry.name,
                "summary": entry.summary,
                "source": entry.source,
                "version": entry.version,
                "needs_calibration": entry.needs_inputs,
            }
            for entry in QUANTIZERS.values()
        ],
        "activations": [
            {"name": fmt.name, "summary": fmt.summary, "bits": fmt.bits, "needs_calibration": fmt.static}
            for fmt in ACTIVATIONS.values()
        ],
        "default_quantizer": DEFAULT_QUANTIZER,
        "default_schemes": [parse_scheme(name).as_json() for name in default_menu()],
    }


@router.get("/metrics-catalog")
def metrics() -> dict[str, Any]:
    """Sensitivity metrics: what they measure, what they need, what they cost."""
    return {
        "items": [
            {
                "name": metric.name,
                "summary": metric.summary,
                "direction": metric.direction,
                "additive": metric.additive,
                "needs": sorted(metric.needs),
                "sees_activations": metric.sees_activations,
                "sees_caches": metric.sees_caches,
                "cost": metric.cost,
                "source": metric.source,
                "version": metric.version,
            }
            for metric in SCORERS.values()
        ]
    }


@router.get("/solvers")
def solvers() -> dict[str, Any]:
    """Programs that pick one scheme per layer ("auto" is the first that suits), and the measured searches."""
    return {
        "items": [{"name": name, "summary": solver.summary} for name, solver in SOLVERS.items()],
        "choosers": [{"name": name, "summary": chooser.summary} for name, chooser in CHOOSERS.items()],
    }


@router.get("/objectives")
def objectives() -> dict[str, Any]:
    """What plans can be solved for, and how each objective is written."""
    return {
        "items": [
            {"name": entry.name, "summary": entry.summary, "examples": list(entry.examples)}
            for entry in OBJECTIVES.values()
        ],
        "default": DEFAULT,
    }


@router.get("/tasks")
def tasks() -> dict[str, Any]:
    """What a model may be for, and how a plan's quality is measured then."""
    return {
        "items": [
            {
                "name": task.name,
                "summary": task.summary,
                "divergence": task.divergence,
                "quality": list(task.quality),
            }
            for task in TASKS.values()
        ]
    }


@router.get("/runtimes")
def runtimes() -> dict[str, Any]:
    """What can run plans, and its rules: formats per operation, shapes, layers that must agree."""
    return {"items": [runtime.as_json() for runtime in RUNTIMES.values()]}


@router.get("/devices")
def devices() -> dict[str, Any]:
    """Devices that rooflines and energy estimates know; a request may bring its own."""
    return {"items": [device.as_json() for device in DEVICES.values()]}


@router.get("/limits")
def limits(context: Ctx) -> dict[str, Any]:
    """How budgets are written, the bounds of this server, and the quotas of your tenant."""
    with context.database.read() as session:
        quotas = usage(context, session)
    return {
        "budget_examples": [example.strip('"') for example in EXAMPLES.split(", ")],
        "byte_units": BYTE_UNITS,
        "time_units_ns": TIME_UNITS,
        "max_upload_bytes": context.settings.max_upload_bytes,
        "max_files": MOST_FILES,
        "max_budgets": MOST_BUDGETS,
        "max_schemes": MOST_SCHEMES,
        "max_page": LARGEST_PAGE,
        "quotas": quotas,
        "requests_per_second": context.settings.rate_limit if quotas else None,
        "model_files": list(MODEL_FILES),
        "calibration_files": list(CALIBRATION_FILES),
    }
