"""What a search would measure, before anything is measured or stored: passes, time, memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.kv_cache import FULL, cache_scheme
from quant.layers import Inventory
from search.problem import Status
from search.solve import solve
from sensitivity.catalog import SCORERS, Workload
from sensitivity.contexts import without_context
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from service import one_off
from service.cascade import share_measured
from service.db import migrate
from service.db.engine import Database, parse_url
from service.db.repositories import scores
from service.deciding import deciding_of, with_roles
from service.picking import bytes_per_worker, pick
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import compile_ask
from service.planning.result import numbers, reason_of
from service.runner.inputs import spec_of
from service.runner.lab import Choices, score_set_of
from service.runner.rivals import MIXTURES, RANDOM
from service.runner.search_job import STEPS, caches_in, check_asks, offered_choices, wanted_metrics
from service.settings import Settings
from service.warnings import warnings_of
from service.wire import JobRequest, LocalJobRequest

Stored = Collection[tuple[str, str, str]]
"""(layer, scheme, metric) that need no measurement."""


def preview(
    settings: Settings, model: ModelSource, data: DataSource, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """`estimate` for a search of these inputs, which one worker loads once, and `budgets`: which can be met.

    Raises what the search would.
    """
    request: JobRequest = LocalJobRequest.model_validate(
        {"model": "model", "calibration": "calibration", **parameters}
    )
    spec = spec_of(request, model, data, settings.memory_limit)
    inspection = one_off.inspect(settings, spec)
    members = request.model_dump(mode="json")
    inputs, asks = check_asks(
        with_roles(members, Inventory.from_json(dict(inspection["inventory"]))), request, inspection
    )
    workers = settings.workers
    request, picked = pick(request, inspection, workers, lambda way: _seconds(way, inspection, workers))
    found = estimate(request, inspection, settings.workers, stored_scores(settings, spec))
    return found | {"picked": picked, "budgets": [_met(inputs, ask) for ask in asks]}


def _met(inputs: PlanningInputs, ask: Ask) -> dict[str, Any]:
    """Whether any plan of the menu is within the limits and, if none is, what they would have to be.

    Latencies that are measured count 0 here, and limits on metrics are passed over, for nothing was measured
    yet.
    """
    problem = compile_ask(inputs, ask).problem
    rows = tuple(row for row in problem.rows if without_context(row.resource) not in SCORERS)
    solution = solve(replace(problem, rows=rows), time_limit=ask.time_limit_seconds)
    return {
        "budget": ask.budget,
        "can_be_met": solution.status is not Status.INFEASIBLE,
        "least_budget": numbers(solution.least_budget),
        "reason": reason_of(inputs, ask, solution),
    }


def estimate(
    request: JobRequest, inspection: Mapping[str, Any], workers: int, stored: Stored = ()
) -> dict[str, Any]:
    """Layers, forward passes per stage (a backward pass counts 2), seconds, bytes per worker.

    Sampled metrics are counted at their most probes. Scores that are stored cost nothing; plans that were
    measured before are not looked for.
    """
    members = request.model_dump(mode="json")
    inventory = with_roles(members, Inventory.from_json(dict(inspection["inventory"])))
    choices = offered_choices(inventory, request, caches_in(request, inspection))
    metrics = wanted_metrics(request, inspection)
    deciding = deciding_of(members, metrics, inventory, inspection)
    wanted = [
        (layer, scheme, metric)
        for layer, names in choices.items()
        for scheme in names
        for metric in deciding.measured(layer)
    ]
    missing = [cell for cell in wanted if cell not in stored]
    swept = len(request.ratios) if deciding.decided else 0
    forwards = {
        "scoring": _scoring(request, inspection, missing),
        **_proving(request, inspection, len(metrics) + swept, len(deciding.planned_by)),
    }
    if request.refine_metric is not None:
        refining = [
            cell
            for layer, names in choices.items()
            for scheme in names
            if (cell := (layer, scheme, request.refine_metric)) not in stored
        ]
        whole = _scoring(request, inspection, refining)
        forwards["scoring"] += round(whole * share_measured(len(request.budgets)))
    return {
        "task": inspection["task"],
        "divergence": inspection["divergence"],
        "metrics": metrics,
        "layers": len(inventory.layers),
        "caches": [name for name in choices if name not in inventory.by_name],
        "parameters": inventory.parameters,
        "excluded": [item.as_json() for item in inventory.excluded],
        "choices": sum(len(names) for names in choices.values()),
        "scores": {"wanted": len(wanted), "stored": len(wanted) - len(missing)},
        "samples": dict(inspection["samples"]),
        "warnings": warnings_of(inspection),
        "batch_size": inspection["batch_size"],
        "forwards": forwards,
        "reuse": _reuse(inspection, choices),
        "seconds": sum(forwards.values()) * float(inspection["forward_seconds"]) / workers,
        "workers": workers,
        "bytes_per_worker": bytes_per_worker(inspection),
        "memory": inspection.get("memory"),
    }


def _seconds(request: JobRequest, inspection: Mapping[str, Any], workers: int) -> float:
    return float(estimate(request, inspection, workers)["seconds"])


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
    request: JobRequest, inspection: Mapping[str, Any], missing: Sequence[tuple[str, str, str]]
) -> int:
    """Forward passes of what is missing: metrics of one (layer, scheme) share theirs, the others add up."""
    samples = inspection["samples"]["scoring"]
    shares = inspection["reuse"]["shares"]
    streamed = bool((inspection.get("memory") or {}).get("streamed"))

    def forwards(metric: str, cells: Collection[tuple[str, str]]) -> float:
        layers = len({layer for layer, _ in cells})
        share = _share(shares, cells)
        batch_size = int(inspection["batch_size"])
        work = Workload(layers, len(cells), samples, request.max_probes, batch_size, share, streamed)
        return SCORERS[without_context(metric)].forwards(work)

    by_metric: dict[str, set[tuple[str, str]]] = {}
    for layer, scheme, metric in missing:
        by_metric.setdefault(metric, set()).add((layer, scheme))
    blocks = {
        name: cells for name, cells in by_metric.items() if SCORERS[without_context(name)].unit == "block"
    }
    sharing: dict[tuple[str, ...], set[tuple[str, str]]] = {}
    for cell in {cell for name, cells in by_metric.items() if name not in blocks for cell in cells}:
        names = tuple(name for name, cells in by_metric.items() if name not in blocks and cell in cells)
        sharing.setdefault(names, set()).add(cell)
    single = [max(forwards(name, cells) for name in names) for names, cells in sharing.items()]
    return round(sum(single) + sum(forwards(name, cells) for name, cells in blocks.items()))


def _reuse(inspection: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    """How many blocks runs can begin at, the share of a pass that a choice costs, or why each is whole."""
    found = inspection["reuse"]
    share = _share(found["shares"], [(layer, name) for layer, names in choices.items() for name in names])
    return {"blocks": len(found["blocks"]), "share": round(share, 4), "whole": found["whole"]}


def _share(shares: Mapping[str, float], cells: Collection[tuple[str, str]]) -> float:
    """The mean share of a pass that a choice costs: all of it for a cache, nothing for one left full."""
    costs = [0.0 if scheme == cache_scheme(FULL) else shares.get(layer, 1.0) for layer, scheme in cells]
    return sum(costs) / max(1, len(costs))


def _proving(
    request: JobRequest, inspection: Mapping[str, Any], metrics: int, contexts: int
) -> dict[str, int]:
    samples, targets = inspection["samples"], len(request.targets)
    answers = contexts * len(request.budgets) + targets
    refined = contexts * len(request.budgets) + STEPS * targets
    uniform = len(request.schemes) * (1 + len(request.kv_cache))
    ends = 1
    plans = metrics + len(MIXTURES) + uniform + ends + RANDOM + request.evaluations
    best_random = 1
    return {
        "choosing": refined * plans * samples["choosing"],
        "reporting": (answers * (1 + ends + best_random) + uniform + 1) * samples["reporting"],
    }
