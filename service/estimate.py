"""What a search would measure, before anything is measured: passes, time, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.layers import Inventory
from sensitivity.catalog import SCORERS, Workload
from service.runner.rivals import MIXTURES
from service.runner.search_job import offered_choices, wanted_metrics
from service.wire import JobRequest

FRAMEWORK_BYTES = 400 * 2**20
"""What a worker process takes before it has loaded a model."""


def estimate(request: JobRequest, inspection: Mapping[str, Any], workers: int) -> dict[str, Any]:
    """Layers, forward passes per stage (a backward pass counts 2), seconds, bytes per worker.

    Sampled metrics are counted at their most probes, and nothing is taken off for scores that are stored.
    """
    inventory = Inventory.from_json(dict(inspection["inventory"]))
    choices = offered_choices(inventory, request)
    samples = inspection["samples"]
    forwards = _forwards(request, inspection, len(choices), sum(map(len, choices.values())))
    return {
        "task": inspection["task"],
        "divergence": inspection["divergence"],
        "layers": len(inventory.layers),
        "parameters": inventory.parameters,
        "excluded": [vars(item) for item in inventory.excluded],
        "choices": sum(map(len, choices.values())),
        "samples": dict(samples),
        "forwards": forwards,
        "seconds": sum(forwards.values()) * float(inspection["forward_seconds"]) / workers,
        "workers": workers,
        "bytes_per_worker": _bytes(inventory, inspection),
    }


def _forwards(
    request: JobRequest, inspection: Mapping[str, Any], layers: int, choices: int
) -> dict[str, int]:
    samples = inspection["samples"]
    metrics = [SCORERS[name] for name in wanted_metrics(request, inspection)]
    work = Workload(layers, choices, samples["scoring"], request.max_probes, request.batch_size)
    shared = max((metric.forwards(work) for metric in metrics if metric.unit == "choice"), default=0)
    blocks = sum(metric.forwards(work) for metric in metrics if metric.unit == "block")
    plans = len(metrics) + len(MIXTURES) + len(request.schemes) + request.evaluations
    return {
        "scoring": shared + blocks,
        "choosing": len(request.budgets) * plans * samples["choosing"],
        "reporting": (len(request.budgets) + len(request.schemes) + 1) * samples["reporting"],
    }


def _bytes(inventory: Inventory, inspection: Mapping[str, Any]) -> int:
    model = inventory.other_bytes + sum(layer.stored_bytes for layer in inventory.layers)
    largest = max(layer.parameters for layer in inventory.layers)
    return FRAMEWORK_BYTES + model + 8 * largest
