"""The handler of searches: look at the model, score, solve every budget, measure, store the plans.

Everything it measures is stored unit by unit, so a search that died goes on where it stopped, and a search
that asks for what another one measured measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.costs import CostError
from quant.devices import DeviceError
from quant.geometry import Geometry
from quant.kv_cache import Caches, is_cache
from quant.latency import cases
from quant.layers import Inventory
from quant.lint import RuntimeRefuses
from quant.patterns import PatternError
from quant.plan import Calibration, Digests
from quant.schemes import parse_scheme
from search.budget import BudgetError, parse_limits
from search.compile import CompileError
from search.decoupled import parts_of
from search.objectives.catalog import parse_objective
from search.objectives.objective import ObjectiveError
from search.pairwise import factor_of
from search.target import Target, parse_target
from sensitivity.catalog import AUTO, INTERACTIONS, SCORERS
from sensitivity.contexts import context_of
from sensitivity.gram import gram_matrix
from sensitivity.units import ScoreRow
from service.cascade import ROUNDS, undecided, with_calibrated
from service.costing import Costs, Timings, cost_request, costs_of, geometry_in, unmeasured
from service.db.repositories import calibrations, models
from service.deciding import (
    EACH,
    Deciding,
    context_names,
    deciding_metric,
    deciding_of,
    scored_metrics,
    with_roles,
)
from service.errors import Conflict, Unprocessable
from service.interactions import keep
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs, ScoresMissing, planning_menu, score_table, table_schemes
from service.planning.question import compile_ask, compile_limits
from service.planning.selection import expand_pins, forbidden_in
from service.runner.context import JobContext
from service.runner.inputs import require_usable, session_spec
from service.runner.lab import Choices, Lab, inventory_of
from service.runner.solving import plan_budget
from service.runner.targets import check_targets, plan_target
from service.runner.timing import timed
from service.states import InputState, Stage
from service.warnings import warnings_of
from service.wire import JobRequest, LocalJobRequest

CANDIDATES = 16
"""About so many plans are measured per budget before the local search."""
STEPS = 3
"""About so many sizes are refined per target."""


@dataclass(frozen=True, eq=False)
class Search:
    """A search after scoring: what each budget is planned from. `choices` are what was scored."""

    request: JobRequest
    inputs: PlanningInputs
    factor: NDArray[np.float64] | None
    inspection: Mapping[str, Any]
    timings: Timings | None = None
    said: Mapping[str, Any] = field(default_factory=dict)
    choices: Choices = field(default_factory=dict)

    @property
    def deciding(self) -> Deciding:
        """What its plans are decided by."""
        assert self.inputs.deciding is not None, "a search always says"
        return self.inputs.deciding


def run_search(context: JobContext) -> Mapping[str, Any]:
    """Run one search to its end and give the job's summary."""
    request = LocalJobRequest.model_validate(dict(context.job.request))
    with open_lab(context, request) as lab:
        search = scored(context, lab, request)
        asks, targets = planned_asks(search.request, search.deciding), targets_of(search.request)
        lab.expect(Stage.SOLVING, (len(asks) + STEPS * len(targets)) * (request.evaluations + CANDIDATES))
        statuses = [plan_budget(context, lab, search, ask) for ask in asks]
        asks += [ask_of(search.request, target.text) for target in targets]
        for target in targets:
            statuses.append(plan_target(context, lab, search, ask_of(search.request, ""), target))
        spent = lab.work()
    kept = keep(context.store, search.inputs.table, search.choices)
    return {**_summary(search, lab, asks, statuses), **search.said, "forwards": spent, "interactions": kept}


def open_lab(context: JobContext, request: JobRequest) -> Lab:
    """The measurements of this request's model and data. Raises Conflict when either cannot be used any
    more.
    """
    with context.database.read() as session:
        model = models.get(session, request.model, context.job.tenant)
        calibration = calibrations.get(session, request.calibration, context.job.tenant)
    model = require_usable(model, request.model)
    if calibration is None or calibration.state == InputState.DELETED:
        raise Conflict(
            "calibration-not-usable",
            f"The calibration must exist. Got {request.calibration}, which was deleted. Send it again.",
        )
    spec = session_spec(request, model, calibration, context.store, context.settings.memory_limit)
    return Lab(context, spec, tuple(request.corrections))


def scored(context: JobContext, lab: Lab, request: JobRequest) -> Search:
    """Score whatever is missing, and gather what planning needs."""
    from service.runner.settling import settle

    inspection = lab.inspect()
    members = request.model_dump(mode="json")
    inventory = with_roles(members, inventory_of(inspection))
    if "memory" in inspection:
        context.event("memory", inspection["memory"])
    check_asks(inventory, request, inspection)
    request, said = settle(context, lab.score_set, request, inspection)
    metrics, samples = wanted_metrics(request, inspection), int(inspection["samples"]["scoring"])
    caches = caches_in(request, inspection)
    choices = offered_choices(inventory, request, caches)
    deciding = deciding_of(members, [*metrics, *_refining(request)], inventory, inspection)
    whole = replace(deciding, metrics=tuple(metrics))
    lab.score(choices, {layer: whole.measured(layer) for layer in choices}, samples)
    timings = _timings(context, lab, inventory, request, geometry_in(inspection))
    costs = _costs(inventory, request, inspection, timings)

    model = context.read(lambda session: models.get(session, request.model, context.job.tenant))
    origin = None if model is None else model.origin

    def gathered() -> PlanningInputs:
        schemes, named = table_schemes(request.schemes, request.pins), deciding.table_metrics
        named += deciding.compared(deciding_metric(request.model_dump(mode="json")))
        found = lab.scores(deciding.all_measured)
        return PlanningInputs(
            inventory=inventory,
            table=score_table(
                inventory, schemes, found, named, costs=costs, deciding=deciding, caches=caches
            ),
            menu=planning_menu(request.schemes, caches),
            digests=Digests(lab.spec.model.digest, lab.spec.calibration.digest, lab.score_set),
            sources=costs.sources,
            calibration=Calibration.of(members),
            corrections=tuple(request.corrections),
            deciding=deciding,
            caches=caches,
            origin=origin,
        )

    inputs = _refined(lab, request, gathered, samples) if request.refine_metric else gathered()
    factor = interactions(lab, inputs, choices, samples)
    if factor is not None:
        paired = {name: factor for name in INTERACTIONS if name in inputs.table.metrics}
        inputs = replace(inputs, table=replace(inputs.table, interactions=dict([*paired.items()][:1])))
    return Search(request, inputs, factor, inspection, timings, said, choices)


def _refined(
    lab: Lab, request: JobRequest, gathered: Callable[[], PlanningInputs], samples: int
) -> PlanningInputs:
    """Measure the refining metric where it may change a decision, round by round, and calibrate the rest."""
    cheap, refined = request.metrics[0], str(request.refine_metric)
    for _ in range(ROUNDS):
        missing = undecided(gathered(), cheap, refined, asks_of(request))
        if not missing:
            break
        lab.score(missing, dict.fromkeys(missing, (refined,)), samples)
    return with_calibrated(gathered(), cheap, refined)


def _refining(request: JobRequest) -> tuple[str, ...]:
    return () if request.refine_metric is None else (request.refine_metric,)


def _timings(
    context: JobContext, lab: Lab, inventory: Inventory, request: JobRequest, geometry: Geometry | None
) -> Timings | None:
    """Kernels timed now, or before on the same device; None unless the request asks for them."""
    wanted = cost_request(request.model_dump(mode="json"))
    if not wanted.is_measured:
        return None
    schemes = [parse_scheme(name) for name in table_schemes(request.schemes, request.pins)]
    return timed(context, lab.spec, cases(inventory.layers, schemes, wanted.batch, geometry))


def _costs(
    inventory: Inventory, request: JobRequest, inspection: Mapping[str, Any], timings: Timings | None
) -> Costs:
    """Latency, energy and memory as the request wants them; zeros for latencies that are still to come."""
    wanted = cost_request(request.model_dump(mode="json"))
    schemes = [parse_scheme(name) for name in table_schemes(request.schemes, request.pins)]
    geometry, caches = geometry_in(inspection), caches_in(request, inspection)
    if timings is None:
        return unmeasured(wanted, inventory, schemes, geometry, caches)
    return costs_of(wanted, inventory, schemes, geometry, timings, caches)


def caches_in(request: JobRequest, inspection: Mapping[str, Any]) -> Caches | None:
    """The attention layers that are to be decided. Raises CostError where the model has none."""
    return Caches.of(request.kv_cache, geometry_in(inspection), request.pins.values())


def check_asks(
    inventory: Inventory, request: JobRequest, inspection: Mapping[str, Any]
) -> tuple[PlanningInputs, list[Ask]]:
    """What is known before anything is measured: exact resources, 0 for every score, and the questions.

    Raises Unprocessable for what a budget, pin or tie names and the model lacks.
    """
    if AUTO in request.metrics:
        request = request.model_copy(update={"metrics": ["output_kl"]})
    members = request.model_dump(mode="json")
    metric = deciding_metric(members)
    named = tuple(dict.fromkeys((metric, *request.metrics)))
    schemes = table_schemes(request.schemes, request.pins)
    try:
        caches = caches_in(request, inspection)
        costs = _costs(inventory, request, inspection, None)
        cells = [*product([layer.name for layer in inventory.layers], schemes)]
        if caches is not None:
            cells += product(caches.layers, caches.schemes)
        blank = [ScoreRow(*cell, name, 0.0, None, 0) for cell in cells for name in named]
        table = score_table(inventory, schemes, blank, named, costs=costs, caches=caches)
        deciding = deciding_of(members, [metric], inventory, inspection)
        inputs = PlanningInputs(
            inventory, table, planning_menu(request.schemes, caches), deciding=deciding, caches=caches
        )
        for ask in asks_of(request):
            compiled = compile_ask(inputs, ask)
            parse_objective(ask.objective).constrained(compiled)
            if deciding.decided:
                parts_of(compiled, deciding.decided)
        if request.targets:
            check_targets(targets_of(request), inspection)
            compile_limits(inputs, ask_of(request, ""), parse_limits(request.limits))
        return inputs, asks_of(request)
    except RuntimeRefuses as error:
        raise Unprocessable("runtime-refuses", str(error), pointer="/runtime") from error
    except (BudgetError, CompileError, CostError, DeviceError, PatternError, ScoresMissing) as error:
        raise Unprocessable("invalid-request", str(error)) from error
    except ObjectiveError as error:
        raise Unprocessable("invalid-objective", str(error), pointer="/objective") from error


def wanted_metrics(request: JobRequest, inspection: Mapping[str, Any]) -> list[str]:
    """The metrics of the request that every choice is measured in and, unless it declines or refines, the
    interactions. Raises Unprocessable for one not offered.
    """
    offered = inspection["available_metrics"]
    for metric in (*request.metrics, *_refining(request)):
        if metric not in offered:
            needs = ", ".join(sorted(SCORERS[metric].needs)) or "another task"
            raise Unprocessable(
                "metric-not-offered",
                f"A metric must suit the task {inspection['task']} and the data: {', '.join(offered)}. "
                f"Got {metric!r}, which needs {needs}. Pick another metric.",
            )
    wanted = scored_metrics(request.metrics, request.refine_metric, interactions=request.interactions)
    return [name for name in wanted if name in offered]


def offered_choices(inventory: Inventory, request: JobRequest, caches: Caches | None) -> Choices:
    """Layer -> its schemes: the menu, a pinned layer's own scheme too, without those that are forbidden or
    that its format or the runtime refuses.
    """
    attention, kinds = ((), ()) if caches is None else (caches.layers, caches.menu)
    pinned = expand_pins(inventory, request.pins, attention)
    schemes = table_schemes(request.schemes, request.pins)
    forbidden = forbidden_in(inventory, schemes, request.runtime, caches, request.forbid)
    weights = [layer.name for layer in inventory.layers]
    menus = dict.fromkeys(weights, table_schemes(request.schemes, {})) | dict.fromkeys(attention, kinds)
    found = {}
    for name, menu in menus.items():
        names = dict.fromkeys((*menu, pinned[name]) if name in pinned else menu)
        found[name] = tuple(
            scheme
            for scheme in names
            if scheme not in forbidden.get(name, ())
            and (is_cache(scheme) or parse_scheme(scheme).refuses(inventory.by_name[name]) is None)
        )
    return found


def interactions(
    lab: Lab, inputs: PlanningInputs, choices: Choices, samples: int
) -> NDArray[np.float64] | None:
    """The factor of the first metric of the table that has interactions; None where none has."""
    named = [name for name in INTERACTIONS if name in inputs.table.metrics]
    return factor_of_metric(lab, inputs, choices, samples, named[0]) if named else None


def factor_of_metric(
    lab: Lab, inputs: PlanningInputs, choices: Choices, samples: int, metric: str
) -> NDArray[np.float64]:
    """The factor (layers, schemes, d) whose inner products are the interactions, zeros where nothing is
    offered. `metric` is one of INTERACTIONS.
    """
    table = inputs.table
    cells = [(layer, scheme) for layer in table.layer_names for scheme in table.schemes]
    found: Mapping[tuple[str, str], NDArray[Any]]
    found = lab.sketches(choices) if metric == "gram_output" else lab.products(metric, choices, samples)
    empty = np.zeros_like(next(iter(found.values())))
    rows = np.stack([found.get(cell, empty) for cell in cells])
    if rows.shape[1] <= len(cells):
        return rows.astype(np.float64).reshape(len(table.layers), len(table.schemes), -1)
    return factor_of(gram_matrix(rows), len(table.layers), len(table.schemes))


def asks_of(request: JobRequest) -> list[Ask]:
    """One question per budget of the request; by one of its metrics where it names several."""
    return [ask_of(request, budget) for budget in request.budgets]


def ask_of(request: JobRequest, budget: str) -> Ask:
    """The question of one budget, "" where a target stands for it."""
    members = request.model_dump(mode="json")
    return Ask.of(members, budget, deciding_metric(members))


def targets_of(request: JobRequest) -> list[Target]:
    """The wanted qualities of a request."""
    return [parse_target(text) for text in request.targets]


def planned_asks(request: JobRequest, deciding: Deciding) -> list[Ask]:
    """One question per budget, and per context where each has its plan."""
    asks = asks_of(request)
    if deciding.plans != EACH:
        return asks
    return [replace(ask, metric=metric) for ask in asks for metric in deciding.planned_by]


def _context_json(ask: Ask) -> dict[str, str]:
    context = context_of(ask.metric or "")
    return {"context": context} if context else {}


def _summary(search: Search, lab: Lab, asks: Sequence[Ask], statuses: list[str]) -> dict[str, Any]:
    inspection = search.inspection
    return {
        "inventory": search.inputs.inventory.as_json(),
        "task": inspection["task"],
        "samples": dict(inspection["samples"]),
        "divergence": inspection["divergence"],
        "metrics": list(search.deciding.table_metrics),
        "plans": [
            {"budget": ask.budget, "status": status} | _context_json(ask)
            for ask, status in zip(asks, statuses, strict=True)
        ],
        "notes": lab.notes(search.inputs.inventory.by_name, search.inputs.table.metrics),
        "score_set": lab.score_set,
        "available_metrics": list(inspection["available_metrics"]),
        "context_names": context_names(inspection),
        "geometry": inspection.get("geometry"),
        "memory": inspection.get("memory"),
        "experts": inspection.get("experts") or {},
        "warnings": warnings_of(inspection),
        "latency": None if search.timings is None else search.timings.as_json(),
    }
