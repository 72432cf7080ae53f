"""What a search would measure, before anything is measured or stored: passes, time, memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quant.layers import Inventory
from sensitivity.catalog import SCORERS, Workload
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from service import one_off
from service.db import migrate
from service.db.engine import Database, parse_url
from service.db.repositories import scores
from service.runner.inputs import spec_of
from service.runner.lab import Choices, score_set_of
from service.runner.rivals import MIXTURES
from service.runner.search_job import check_asks, offered_choices, wanted_metrics
from service.settings import Settings
from service.wire import JobRequest

FRAMEWORK_BYTES = 400 * 2**20
"""What a worker process takes before it has loaded a model."""

Stored = Collection[tuple[str, str, str]]
"""(layer, scheme, metric) that need no measurement."""


def preview(
    settings: Settings, model: ModelSource, data: DataSource, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """`estimate` for a search of these inputs, which one worker loads once. Raises what the search would."""
    request = JobRequest.model_validate({"model": "model", "calibration": "calibration", **parameters})
    spec = spec_of(request, model, data)
    inspection = one_off.inspect(settings, spec)
    check_asks(Inventory.from_json(dict(inspection["inventory"])), request, inspection)
    return estimate(request, inspection, settings.workers, stored_scores(settings, spec))


def estimate(
    request: JobRequest, inspection: Mapping[str, Any], workers: int, stored: Stored = ()
) -> dict[str, Any]:
    """Layers, forward passes per stage (a backward pass counts 2), seconds, bytes per worker.

    Sampled metrics are counted at their most probes. Scores that are stored cost nothing; plans that were
    measured before are not looked for.
    """
    inventory = Inventory.from_json(dict(inspection["inventory"]))
    choices = offered_choices(inventory, request)
    metrics = wanted_metrics(request, inspection)
    cells = [(layer, scheme) for layer, names in choices.items() for scheme in names]
    known = sum((*cell, metric) in stored for cell in cells for metric in metrics)
    forwards = {
        "scoring": _scoring(request, inspection, choices, metrics, stored),
        **_proving(request, inspection, len(metrics)),
    }
    return {
        "task": inspection["task"],
        "divergence": inspection["divergence"],
        "metrics": metrics,
        "layers": len(inventory.layers),
        "parameters": inventory.parameters,
        "excluded": [item.as_json() for item in inventory.excluded],
        "choices": len(cells),
        "scores": {"wanted": len(cells) * len(metrics), "stored": known},
        "samples": dict(inspection["samples"]),
        "forwards": forwards,
        "seconds": sum(forwards.values()) * float(inspection["forward_seconds"]) / workers,
        "workers": workers,
        "bytes_per_worker": _bytes(inventory, inspection),
    }


def stored_scores(settings: Settings, spec: SessionSpec) -> Stored:
    """What a search in this data directory would not measure again; nothing is created."""
    url = parse_url(settings.database_url)
    if url.drivername == "sqlite" and not Path(str(url.database)).exists():
        return frozenset()
    if migrate.current(settings.database_url) != migrate.newest():
        return frozenset()
    database = Database(settings.database_url)
    try:
        with database.read() as session:
            return scores.keys(session, score_set_of(spec)[0])
    finally:
        database.close()


def _scoring(
    request: JobRequest,
    inspection: Mapping[str, Any],
    choices: Choices,
    metrics: list[str],
    stored: Stored,
) -> int:
    """Forward passes of what is not stored: metrics of single choices share theirs, the others add up."""
    missing = {
        metric: {
            (layer, scheme)
            for layer, schemes in choices.items()
            for scheme in schemes
            if (layer, scheme, metric) not in stored
        }
        for metric in metrics
    }
    samples = inspection["samples"]["scoring"]

    def forwards(metric: str) -> int:
        cells = missing[metric]
        layers = len({layer for layer, _ in cells})
        return SCORERS[metric].forwards(
            Workload(layers, len(cells), samples, request.max_probes, request.batch_size)
        )

    wanted = [metric for metric in metrics if missing[metric]]
    single = [forwards(metric) for metric in wanted if SCORERS[metric].unit == "choice"]
    return max(single, default=0) + sum(
        forwards(metric) for metric in wanted if SCORERS[metric].unit == "block"
    )


def _proving(request: JobRequest, inspection: Mapping[str, Any], metrics: int) -> dict[str, int]:
    samples, budgets = inspection["samples"], len(request.budgets)
    plans = metrics + len(MIXTURES) + len(request.schemes) + request.evaluations
    return {
        "choosing": budgets * plans * samples["choosing"],
        "reporting": (budgets + len(request.schemes) + 1) * samples["reporting"],
    }


def _bytes(inventory: Inventory, inspection: Mapping[str, Any]) -> int:
    model = inventory.other_bytes + sum(layer.stored_bytes for layer in inventory.layers)
    largest = max(layer.parameters for layer in inventory.layers)
    return FRAMEWORK_BYTES + model + 8 * largest
