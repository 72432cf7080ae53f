"""The metric `auto`: the most trusted scores that task, menu, memory and time allow. No torch.

The order of trust is that of docs/metrics.md; what each way would cost is estimated from the model's
inspection, and the answer says what was passed over and why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.layers import Inventory
from sensitivity.catalog import AUTO, SCORERS, unseen
from service.errors import Unprocessable
from service.wire import JobRequest

FRAMEWORK_BYTES = 400 * 2**20
"""What a worker process takes before it has loaded a model."""
DEFAULT_SECONDS = 900.0
"""What a search with metric auto may take where no time budget says so."""
GRAPH_FACTOR = 20
"""Activations that a backward pass keeps per block, in outputs of the block: about those of a transformer."""


@dataclass(frozen=True)
class Way:
    """One way to score: `metrics` as a request names them, `refine` what is measured near decisions alone."""

    metrics: tuple[str, ...]
    refine: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return "+".join(self.metrics) + (f", refined by {self.refine}" if self.refine else "")

    def asked(self, request: JobRequest) -> JobRequest:
        """The request with this way's metrics."""
        return request.model_copy(update={"metrics": list(self.metrics), "refine_metric": self.refine})


WAYS = (
    Way(("output_kl",)),
    Way(("gram_fisher",), "output_kl"),
    Way(("gram_fisher",)),
    Way(("fisher",)),
    Way(("layer_output_error",)),
    Way(("weight_error",)),
)
"""The most trusted first."""


def settled(request: Mapping[str, Any], summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """A stored request with the metrics that `auto` picked, once the job has picked them."""
    return {**request, **((summary or {}).get("picked") or {}).get("request", {})}


def is_settled(request: Mapping[str, Any]) -> bool:
    """Whether the metrics of a request have names."""
    return AUTO not in request["metrics"]


def pick(
    request: JobRequest,
    inspection: Mapping[str, Any],
    workers: int,
    seconds: Callable[[JobRequest], float],
) -> tuple[JobRequest, dict[str, Any] | None]:
    """The request with the metrics it means, and for `auto` what was picked and why, as JSON.

    `seconds` estimates what a request without `auto` takes. Raises Unprocessable where no way is possible
    with so many workers.
    """
    if AUTO not in request.metrics:
        return request, None
    allowed = DEFAULT_SECONDS if request.time_budget_seconds is None else request.time_budget_seconds
    considered = [_judged(way, request, inspection, workers, seconds) for way in WAYS]
    possible = [entry for entry in considered if entry["problem"] is None]
    if not possible:
        raise _impossible(considered)
    fitting = [entry for entry in possible if entry["seconds"] <= allowed]
    chosen = fitting[0] if fitting else min(possible, key=lambda entry: float(entry["seconds"]))
    way = next(way for way in WAYS if way.name == chosen["name"])
    return way.asked(request), {
        "request": {"metrics": list(way.metrics), "refine_metric": way.refine},
        "why": _why(chosen, allowed, bool(fitting)),
        "considered": considered,
    }


def _impossible(considered: Sequence[Mapping[str, Any]]) -> Unprocessable:
    problems = "; ".join(f"{entry['name']}: {entry['problem']}" for entry in considered)
    return Unprocessable(
        "nothing-fits",
        f"The metric auto must have a way to score. Got none: {problems}. Set memory_limit, start fewer"
        " workers, or name the metrics.",
        pointer="/metrics",
        extra={"considered": list(considered)},
    )


def _judged(
    way: Way,
    request: JobRequest,
    inspection: Mapping[str, Any],
    workers: int,
    seconds: Callable[[JobRequest], float],
) -> dict[str, Any]:
    problem = _problem(way, request, inspection, workers)
    taken = None if problem else round(seconds(way.asked(request)), 3)
    return {"name": way.name, "seconds": taken, "problem": problem}


def _problem(way: Way, request: JobRequest, inspection: Mapping[str, Any], workers: int) -> str | None:
    """Why a way cannot be gone; None if it can."""
    named = (*way.metrics, *([way.refine] if way.refine else []))
    missing = [name for name in named if name not in inspection["available_metrics"]]
    if missing:
        return f"{missing[0]} is not offered for this task and data"
    blind = [name for name in named if unseen(name, request.rounding) is not None]
    if blind:
        return f"{blind[0]} does not see rounded {'caches' if request.kv_cache else 'activations'}"
    limit = inspection.get("memory")
    if limit is not None and _differentiates(way) and not limit["gradients_fit"]:
        return "its gradients do not fit in the limit on memory"
    graph = _graph_bytes(inspection) if limit is None and _differentiates(way) else 0
    needed = bytes_per_worker(inspection) + graph
    if needed * workers > _memory():
        return f"it needs about {needed:,} bytes of memory in each of {workers} workers"
    return None


def _differentiates(way: Way) -> bool:
    return any(SCORERS[name].unit == "block" for name in way.metrics)


def _graph_bytes(inspection: Mapping[str, Any]) -> int:
    reuse = inspection["reuse"]
    return int(GRAPH_FACTOR * max(1, len(reuse["blocks"])) * reuse["bytes"])


def _memory() -> int:
    """Bytes of this machine, which its workers share."""
    return max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), FRAMEWORK_BYTES)


def _why(chosen: Mapping[str, Any], allowed: float, fits: bool) -> str:
    about = f"{chosen['name']}: about {chosen['seconds']:.0f} s of the {allowed:.0f} s allowed"
    if fits:
        return f"{about}; the most trusted that fits"
    return f"{about}; nothing fits, this is the quickest"


def bytes_per_worker(inspection: Mapping[str, Any]) -> int:
    """About what a worker holds that measures with forward passes; no more than its limit."""
    inventory = Inventory.from_json(dict(inspection["inventory"]))
    model = inventory.other_bytes + sum(layer.stored_bytes for layer in inventory.layers)
    largest = max(layer.parameters for layer in inventory.layers)
    expected = FRAMEWORK_BYTES + model + 8 * largest + int(inspection["reuse"]["kept_bytes"])
    return min(expected, int((inspection.get("memory") or {"limit": expected})["limit"]))
