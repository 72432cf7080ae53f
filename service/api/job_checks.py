"""Whether a search can work at all, as far as that is known before a worker has seen the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.orm import Session

from quant.costs import CostError, latency_from_mapping
from quant.devices import read_device
from quant.kv_cache import Caches, is_cache
from quant.layers import Excluded, Inventory
from quant.lint import RuntimeRefuses, require_cache_choices, require_choices
from quant.patterns import PatternError, matches, select
from quant.runtimes import RUNTIMES
from search.budget import parse_limits
from sensitivity.catalog import AUTO, SCORERS, offered_metrics
from sensitivity.scorers.metric_decoupled import ROLES
from service.api.context import Context
from service.api.lookup import stored_inventory, usable
from service.costing import DEVICE, MEASURED, ROOFLINE, geometry_in, named_device
from service.db.repositories import calibrations, models
from service.errors import Unprocessable, json_pointer
from service.planning.selection import expand_pins
from service.records import CalibrationRecord, ModelRecord
from service.wire import JobRequest

LONGEST_WAIT = timedelta(days=366)
KEYED = (("pins",), ("forbid",), ("roles",), ("role_metrics",), ("role_limits",))
"""Members whose keys are patterns."""


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


def require_future(deadline: datetime | None) -> None:
    """Raise Unprocessable unless the deadline is to come, and within a year."""
    now = datetime.now(UTC)
    if deadline is not None and not now < deadline <= now + LONGEST_WAIT:
        raise Unprocessable(
            "invalid-deadline",
            f"deadline must be in the future, at most {LONGEST_WAIT.days} days from now. Got "
            f"{deadline.isoformat()}; it is {now.isoformat(timespec='seconds')}. Name a later time, or none.",
            pointer="/deadline",
        )


def _check_metrics(body: JobRequest, calibration: CalibrationRecord) -> None:
    """A task that is named decides what it offers; with task "auto" the worker decides."""
    if body.task == "auto":
        return
    has_labels = bool((calibration.summary or {}).get("has_labels"))
    offered = offered_metrics(body.task, has_labels=has_labels)
    named: list[tuple[tuple[str | int, ...], str | None]] = [
        *((("metrics", position), metric) for position, metric in enumerate(body.metrics)),
        *((("role_metrics", key), metric) for key, metric in body.role_metrics.items()),
        (("refine_metric",), body.refine_metric),
    ]
    for place, metric in named:
        if metric is not None and metric != AUTO and metric not in offered:
            needs = ", ".join(sorted(SCORERS[metric].needs))
            raise Unprocessable(
                "metric-not-offered",
                f"A metric must suit the task and data: {', '.join(offered)}. Got {metric!r}, which needs "
                f"{needs}. Pick another metric, or send calibration data with labels.",
                pointer=json_pointer(*place),
            )


def _check_latency(body: JobRequest) -> None:
    limited = {
        limit.resource for limit in parse_limits([*body.budgets, *body.limits, *body.role_limits.values()])
    }
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
    caches = _caches(body, model.summary or {})
    attention = () if caches is None else caches.layers
    listed = (*inventory["layers"], *inventory["excluded"])
    everything = [name for item in listed for name in (item["name"], *item.get("aliases", ()))]
    _require(body.include, everything, "include")
    _require(body.exclude, everything, "exclude")
    _require(body.protect, everything, "protect")
    _require(body.roles, everything, "roles")
    _require([key for key in body.role_metrics if key not in ROLES], everything, "role_metrics")
    _require([key for key in body.role_limits if key not in ROLES], everything, "role_limits")
    forbidden = [(pattern, scheme) for pattern, names in body.forbid.items() for scheme in names]
    for member, named in (("pins", body.pins.items()), ("forbid", forbidden)):
        for pattern, scheme in named:
            if not is_cache(scheme) or caches is not None:
                _require([pattern], attention if is_cache(scheme) else everything, member)
    if caches is None and body.kv_cache:
        return
    for position, tie in enumerate(body.ties):
        _require(tie, (*everything, *attention), "ties", position)
    if body.runtime is not None:
        _check_runtime(body, body.runtime, Inventory.from_json(inventory), caches)


def _caches(body: JobRequest, summary: Mapping[str, Any]) -> Caches | None:
    """The attention layers to decide; None too for a model that was verified before these were looked for,
    which the worker sees.
    """
    geometry = summary.get("geometry")
    if "geometry" not in summary or (geometry is not None and "attention" not in geometry):
        return None
    try:
        return Caches.of(body.kv_cache, geometry_in(summary), body.pins.values())
    except CostError as error:
        raise Unprocessable("no-kv-cache", str(error), pointer="/kv_cache") from None


def _check_runtime(
    body: JobRequest, runtime: str, inventory: Inventory, caches: Caches | None = None
) -> None:
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
    attention = () if caches is None else caches.layers
    pins = expand_pins(inventory, _known_pins(body, inventory, attention), attention)
    try:
        if caches is not None:
            require_cache_choices(caches, pins, RUNTIMES[runtime])
        require_choices(
            replace(inventory, layers=layers, excluded=tuple(kept)),
            body.schemes,
            {name: scheme for name, scheme in pins.items() if name in present},
            RUNTIMES[runtime],
        )
    except RuntimeRefuses as error:
        raise Unprocessable("runtime-refuses", str(error), pointer="/runtime") from None


def _known_pins(body: JobRequest, inventory: Inventory, attention: Sequence[str]) -> dict[str, str]:
    """The pins that name a layer; those of embeddings and heads that are to take part do not yet."""
    names = [*inventory.by_name, *attention]
    return {
        pattern: scheme
        for pattern, scheme in body.pins.items()
        if any(matches(pattern, name) for name in names)
    }


def _require(patterns: Iterable[str], names: Sequence[str], *place: Any) -> None:
    for position, pattern in enumerate(patterns):
        try:
            select([pattern], names)
        except PatternError as error:
            member = pattern if place in KEYED else position
            raise Unprocessable("unknown-layer", str(error), pointer=json_pointer(*place, member)) from None
