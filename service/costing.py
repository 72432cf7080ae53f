"""Where a plan's latency, energy and memory come from: what a request says of them, turned into tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quant.costs import CostError, Grid, Latency, latency_from_mapping
from quant.deployment import Deployment, deployment_resources
from quant.devices import DEVICES, Device, read_device
from quant.geometry import Geometry, geometry_from_json
from quant.kv_cache import Caches
from quant.latency import Timing, cases, device_energy, measured_latency, roofline_latency
from quant.layers import Inventory
from quant.schemes import Scheme

MEMBERS = ("latency", "latency_ns", "energy", "deployment", "device_profile")
"""The members of a request that decide the costs."""
MEASURED, ROOFLINE, DEVICE = "measured", "roofline:", "device:"


class LatencyMissing(ValueError):  # noqa: N818 - named after what went wrong
    """Latencies that a job has not measured."""


@dataclass(frozen=True)
class Timings:
    """Kernels that were timed: by `Case.key`, and the fingerprint of the device."""

    fingerprint: str
    timings: Mapping[str, Timing]

    def as_json(self) -> dict[str, Any]:
        """Plain values; `timings_from_json` reads them back."""
        cells = {key: timing.as_json() for key, timing in self.timings.items()}
        return {"fingerprint": self.fingerprint, "timings": cells}


def timings_from_json(value: Mapping[str, Any]) -> Timings:
    """Inverse of `Timings.as_json`."""
    cells = {key: Timing(**timing) for key, timing in value["timings"].items()}
    return Timings(value["fingerprint"], cells)


@dataclass(frozen=True)
class CostRequest:
    """The cost members of a request, all optional. `latency` is "measured", "roofline:NAME" or a table."""

    latency: str | Mapping[str, Mapping[str, float]] | None = None
    energy: str | Mapping[str, Mapping[str, float]] | None = None
    deployment: Deployment | None = None
    device: Device | None = None
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Samples or tokens of one pass."""
        return 1 if self.deployment is None else self.deployment.batch

    @property
    def is_measured(self) -> bool:
        """Whether a worker has to time kernels."""
        return self.latency == MEASURED


def cost_request(*requests: Mapping[str, Any]) -> CostRequest:
    """The costs that requests ask for; what an earlier one leaves out is taken from the next.

    Raises CostError or DeviceError.
    """
    given: dict[str, Any] = {}
    for request in reversed(requests):
        own = {name: request[name] for name in MEMBERS if request.get(name) is not None}
        if "latency" in own or "latency_ns" in own:
            given = {name: value for name, value in given.items() if name not in ("latency", "latency_ns")}
        given |= own
    deployment = given.get("deployment")
    profile = given.get("device_profile")
    return CostRequest(
        latency=given.get("latency", given.get("latency_ns")),
        energy=given.get("energy"),
        deployment=None if deployment is None else Deployment(**deployment),
        device=None if profile is None else read_device(profile),
        members=given,
    )


def without_costs(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request without the members that decide the costs."""
    return {name: value for name, value in request.items() if name not in MEMBERS}


@dataclass(frozen=True)
class Costs:
    """Tables and resources beside bytes and BOPs. `sources` says where each came from, for answers."""

    latency: Latency | None = None
    energy: Latency | None = None
    resources: Mapping[str, Grid] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def costs_of(
    request: CostRequest,
    inventory: Inventory,
    schemes: Sequence[Scheme],
    geometry: Geometry | None,
    timings: Timings | None,
    caches: Caches | None = None,
) -> Costs:
    """Every table that a request asks for; where `caches` are decided, those of a deployment, if need be the
    default one. Raises CostError, DeviceError, LatencyMissing (no timings).
    """
    latency, latency_source = _latency(request, inventory, schemes, timings, geometry)
    energy, energy_source = _energy(request, inventory, schemes, geometry)
    grids: Mapping[str, Grid] = {}
    if request.deployment is not None or caches is not None:
        deployment = request.deployment or Deployment()
        grids = deployment_resources(inventory, schemes, deployment, geometry, caches)
    sources = {"latency": latency_source, "energy": energy_source}
    return Costs(latency, energy, grids, {name: value for name, value in sources.items() if value})


def unmeasured(
    request: CostRequest,
    inventory: Inventory,
    schemes: Sequence[Scheme],
    geometry: Geometry | None,
    caches: Caches | None = None,
) -> Costs:
    """The same with zeros for latencies that are still to be measured: for checks of what limits name."""
    if not request.is_measured:
        return costs_of(request, inventory, schemes, geometry, None, caches)
    wanted = cases(inventory.layers, schemes, request.batch, geometry)
    zeros = Timings("", {case.key: Timing(0, 0, 0) for case in wanted})
    return costs_of(request, inventory, schemes, geometry, zeros, caches)


def geometry_in(facts: Mapping[str, Any]) -> Geometry | None:
    """The geometry among an inspection's facts."""
    found = facts.get("geometry")
    return None if found is None else geometry_from_json(found)


def named_device(name: str, own: Device | None) -> Device:
    """The request's own profile where it has that name, else one of DEVICES. Raises CostError."""
    if own is not None and own.name == name:
        return own
    if name not in DEVICES:
        known = ", ".join(dict.fromkeys((*DEVICES, *(() if own is None else (own.name,)))))
        raise CostError(
            f"A device must be one of {known}. Got {name!r}. Send your own as device_profile under that name."
        )
    return DEVICES[name]


def _latency(
    request: CostRequest,
    inventory: Inventory,
    schemes: Sequence[Scheme],
    timings: Timings | None,
    geometry: Geometry | None,
) -> tuple[Latency | None, dict[str, Any]]:
    wanted = request.latency
    if wanted is None:
        return None, {}
    if not isinstance(wanted, str):
        return latency_from_mapping(wanted), {"source": "table"}
    if wanted == MEASURED:
        return _measured(request, inventory, schemes, timings, geometry)
    if not wanted.startswith(ROOFLINE):
        raise CostError(
            f'A latency must be a table, "measured" or "roofline:DEVICE". Got {wanted!r:.60}.'
            " Use roofline:h100."
        )
    device = named_device(wanted.removeprefix(ROOFLINE), request.device)
    table = roofline_latency(inventory.layers, schemes, request.batch, device, geometry)
    return table, {"source": wanted, "relative_error": device.relative_error}


def _measured(
    request: CostRequest,
    inventory: Inventory,
    schemes: Sequence[Scheme],
    timings: Timings | None,
    geometry: Geometry | None,
) -> tuple[Latency, dict[str, Any]]:
    if timings is None:
        raise LatencyMissing(
            'A measured latency must come from a job with latency "measured" that has ended. Got none. '
            "Wait for the job, submit one, or use a roofline."
        )
    try:
        table = measured_latency(inventory.layers, schemes, request.batch, timings.timings, geometry)
    except CostError as error:
        raise LatencyMissing(f"{error} (The job measured other kernels or another batch.)") from error
    spreads = [timing.spread_ns / timing.median_ns for timing in timings.timings.values() if timing.median_ns]
    source = {"source": MEASURED, "fingerprint": timings.fingerprint}
    return table, source | {"relative_error": max(spreads, default=0.0)}


def _energy(
    request: CostRequest, inventory: Inventory, schemes: Sequence[Scheme], geometry: Geometry | None
) -> tuple[Latency | None, dict[str, Any]]:
    wanted = request.energy
    if wanted is None:
        return None, {}
    if not isinstance(wanted, str):
        return latency_from_mapping(wanted), {"source": "table"}
    if not wanted.startswith(DEVICE):
        raise CostError(f'An energy must be a table or "device:NAME". Got {wanted!r:.60}. Use device:h100.')
    device = named_device(wanted.removeprefix(DEVICE), request.device)
    table = device_energy(inventory.layers, schemes, request.batch, device, geometry)
    return table, {"source": wanted}
