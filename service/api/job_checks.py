"""Whether a search can work at all, as far as that is known before a worker has seen the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from quant.costs import CostError, latency_from_mapping
from quant.devices import read_device
from quant.layers import Excluded, Inventory
from quant.lint import RuntimeRefuses, require_choices
from quant.patterns import PatternError, matches, select
from quant.runtimes import RUNTIMES
from search.budget import parse_limits
from sensitivity.catalog import SCORERS, offered_metrics
from service.api.context import Context
from service.api.lookup import stored_inventory, usable
from service.costing import DEVICE, MEASURED, ROOFLINE, named_device
from service.db.repositories import calibrations, models
from service.errors import Unprocessable, json_pointer
from service.planning import expand_pins
from service.records import CalibrationRecord, ModelRecord
from service.wire import JobRequest


def check_job(context: Context, session: Session, body: JobRequest) -> None:
    """Raise the problem that the request would run into; unknown ids, names, resources and metrics."""
    model = models.get(session, body.model, context.tenant)
    usable("model", model, body.model)
    calibration = calibrations.get(session, body.calibration, context.tenant)
    usable("calibration", calibration, body.calibration)
    assert model is not None
    assert calibration is not None
    _check_metrics(body, calibration)
    _check_latency(body)
    _check_names(body, model)


def _check_metrics(body: JobRequest, calibration: CalibrationRecord) -> None:
    """A task that is named decides what it offers; with task "auto" the worker decides."""
    if body.task == "auto":
        return
    has_labels = bool((calibration.summary or {}).get("has_labels"))
    offered = offered_metrics(body.task, has_labels=has_labels)
    for position, metric in enumerate(body.metrics):
        if metric not in offered:
            needs = ", ".join(sorted(SCORERS[metric].needs))
            raise Unprocessable(
                "metric-not-offered",
                f"A metric must suit the task and data: {', '.join(offered)}. Got {metric!r}, which needs "
                f"{needs}. Pick another metric, or send calibration data with labels.",
                pointer=json_pointer("metrics", position),
            )


def _check_latency(body: JobRequest) -> None:
    limited = {limit.resource for limit in parse_limits([*body.budgets, *body.limits])}
    table = body.latency_ns if body.latency is None else body.latency
    if "latency_ns" in limited and table is None:
        raise Unprocessable(
            "missing-latency",
            'A limit on latency must come with latency: "measured", "roofline:h100", or a table of '
            "nanoseconds. Got none. Add it, or limit bytes or bits per weight.",
            pointer="/latency",
        )
    place = "/latency_ns" if body.latency is None else "/latency"
    for pointer, found, prefix in ((place, table, ROOFLINE), ("/energy", body.energy, DEVICE)):
        _check_source(body, found, prefix, pointer)
    if body.latency == MEASURED and body.device != "cpu":
        raise Unprocessable(
            "invalid-latency",
            f"A measured latency must be of device cpu. Got {body.device}. Use a roofline or a table.",
            pointer="/latency",
        )


def _check_source(body: JobRequest, source: Any, prefix: str, pointer: str) -> None:
    """A table must be readable, and a named device known."""
    try:
        if isinstance(source, str):
            if source.startswith(prefix):
                own = None if body.device_profile is None else read_device(body.device_profile)
                named_device(source.removeprefix(prefix), own)
        elif source is not None:
            latency_from_mapping(source)
    except CostError as error:
        slug = "invalid-costs" if pointer == "/energy" else "invalid-latency"
        raise Unprocessable(slug, str(error), pointer=pointer) from None


def _check_names(body: JobRequest, model: ModelRecord) -> None:
    """Patterns must match a layer, once the model has been verified."""
    inventory = stored_inventory(model)
    if inventory is None:
        return
    listed = (*inventory["layers"], *inventory["excluded"])
    everything = [name for item in listed for name in (item["name"], *item.get("aliases", ()))]
    _require(body.include, everything, "include")
    _require(body.exclude, everything, "exclude")
    _require(body.pins, everything, "pins")
    for position, tie in enumerate(body.ties):
        _require(tie, everything, "ties", position)
    if body.runtime is not None:
        _check_runtime(body, body.runtime, Inventory.from_json(inventory))


def _check_runtime(body: JobRequest, runtime: str, inventory: Inventory) -> None:
    """Every layer of the verified model that takes part must have a choice; the worker sees the others."""
    left_out = {
        layer.name
        for layer in inventory.layers
        if any(matches(pattern, name) for pattern in body.exclude for name in layer.names)
    }
    layers = tuple(layer for layer in inventory.layers if layer.name not in left_out)
    kept = [
        Excluded(layer.name, layer.op, 0, "excluded", layer.aliases)
        for layer in inventory.layers
        if layer.name in left_out
    ]
    present = {layer.name for layer in layers}
    pins = expand_pins(inventory, _known_pins(body, inventory))
    try:
        require_choices(
            replace(inventory, layers=layers, excluded=tuple(kept)),
            body.schemes,
            {name: scheme for name, scheme in pins.items() if name in present},
            RUNTIMES[runtime],
        )
    except RuntimeRefuses as error:
        raise Unprocessable("runtime-refuses", str(error), pointer="/runtime") from None


def _known_pins(body: JobRequest, inventory: Inventory) -> dict[str, str]:
    """The pins that name a layer; those of embeddings and heads that are to take part do not yet."""
    names = list(inventory.by_name)
    return {
        pattern: scheme
        for pattern, scheme in body.pins.items()
        if any(matches(pattern, name) for name in names)
    }


def _require(patterns: Iterable[str], names: list[str], *place: Any) -> None:
    for position, pattern in enumerate(patterns):
        try:
            select([pattern], names)
        except PatternError as error:
            member = pattern if place == ("pins",) else position
            raise Unprocessable("unknown-layer", str(error), pointer=json_pointer(*place, member)) from None
