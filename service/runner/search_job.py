"""The handler of searches: look at the model, score, solve every budget, measure, store the plans.

Everything it measures is stored unit by unit, so a search that died goes on where it stopped, and a search
that asks for what another one measured measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.costs import CostError
from quant.devices import DeviceError
from quant.digest import digest
from quant.geometry import Geometry
from quant.latency import cases
from quant.layers import Inventory
from quant.lint import RuntimeRefuses
from quant.patterns import PatternError
from quant.plan import Calibration, Digests
from quant.schemes import parse_scheme
from search.budget import BudgetError
from search.choosers import CHOOSERS
from search.compile import CompileError
from search.pairwise import factor_of
from search.refine import Measured, Refined
from search.solve import solve
from sensitivity.catalog import SCORERS, with_interactions
from sensitivity.gram import gram_matrix
from sensitivity.units import ScoreRow
from service.costing import Costs, Timings, cost_request, costs_of, geometry_in, unmeasured
from service.db.repositories import calibrations, models, plans
from service.errors import Conflict, Unprocessable
from service.failpoints import failpoint
from service.planning import (
    Ask,
    PlanningInputs,
    ScoresMissing,
    compile_ask,
    expand_pins,
    forbidden_in,
    plan_of,
    plan_result,
    score_table,
    table_schemes,
)
from service.runner.context import JobContext
from service.runner.evidence import measured_evidence
from service.runner.inputs import session_spec
from service.runner.lab import Choices, Lab, inventory_of
from service.runner.rivals import candidates, screen
from service.runner.timing import timed
from service.states import InputState, Stage
from service.wire import JobRequest

CANDIDATES = 8
"""About so many plans are measured per budget before the local search."""


@dataclass(frozen=True, eq=False)
class Search:
    """A search after scoring: what each budget is planned from."""

    request: JobRequest
    inputs: PlanningInputs
    factor: NDArray[np.float64] | None
    inspection: Mapping[str, Any]
    timings: Timings | None = None


def run_search(context: JobContext) -> Mapping[str, Any]:
    """Run one search to its end and give the job's summary."""
    request = JobRequest.model_validate(dict(context.job.request))
    with open_lab(context, request) as lab:
        search = scored(context, lab, request)
        asks = asks_of(request)
        lab.expect(Stage.SOLVING, len(asks) * (request.evaluations + CANDIDATES))
        statuses = [_plan(context, lab, search, ask) for ask in asks]
    return _summary(search, lab, statuses)


def open_lab(context: JobContext, request: JobRequest) -> Lab:
    """The measurements of this request's model and data. Raises Conflict when either cannot be used any
    more.
    """
    with context.database.read() as session:
        model = models.get(session, request.model, context.job.tenant)
        calibration = calibrations.get(session, request.calibration, context.job.tenant)
    if model is None or model.state in (InputState.DELETED, InputState.REJECTED):
        cause = dict((model.problem if model else None) or {})
        why = f"rejected: {cause['detail']}" if cause else "deleted."
        raise Conflict(
            "model-not-usable",
            f"The model must be usable. Got {request.model}, which was {why} Send a model again.",
            extra={"cause": cause} if cause else {},
        )
    if calibration is None or calibration.state == InputState.DELETED:
        raise Conflict(
            "calibration-not-usable",
            f"The calibration must exist. Got {request.calibration}, which was deleted. Send it again.",
        )
    return Lab(context, session_spec(request, model, calibration, context.store), tuple(request.corrections))


def scored(context: JobContext, lab: Lab, request: JobRequest) -> Search:
    """Score whatever is missing, and gather what planning needs."""
    inspection = lab.inspect()
    inventory = inventory_of(inspection)
    metrics = wanted_metrics(request, inspection)
    schemes = table_schemes(request.schemes, request.pins)
    check_asks(inventory, request, inspection)
    choices = offered_choices(inventory, request)
    lab.score(choices, metrics, int(inspection["samples"]["scoring"]))
    timings = _timings(context, lab, inventory, request, geometry_in(inspection))
    costs = _costs(inventory, request, inspection, timings)
    inputs = PlanningInputs(
        inventory=inventory,
        table=score_table(inventory, schemes, lab.scores(metrics), metrics, costs=costs),
        menu=table_schemes(request.schemes, {}),
        digests=Digests(lab.spec.model.digest, lab.spec.calibration.digest, lab.score_set),
        sources=costs.sources,
        calibration=Calibration.of(request.model_dump(mode="json")),
        corrections=tuple(request.corrections),
    )
    factor = interactions(lab, inputs, choices, int(inspection["samples"]["scoring"]))
    return Search(request, inputs, factor, inspection, timings)


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
    if timings is None:
        return unmeasured(wanted, inventory, schemes, geometry_in(inspection))
    return costs_of(wanted, inventory, schemes, geometry_in(inspection), timings)


def check_asks(inventory: Inventory, request: JobRequest, inspection: Mapping[str, Any]) -> None:
    """Raise Unprocessable for what a budget, pin or tie names and the model lacks, before measuring."""
    metric = request.metrics[0]
    schemes = table_schemes(request.schemes, request.pins)
    try:
        costs = _costs(inventory, request, inspection, None)
        blank = [
            ScoreRow(layer.name, name, metric, 0.0, None, 0) for layer in inventory.layers for name in schemes
        ]
        table = score_table(inventory, schemes, blank, [metric], costs=costs)
        inputs = PlanningInputs(inventory, table, table_schemes(request.schemes, {}))
        for ask in asks_of(request):
            compile_ask(inputs, ask)
    except RuntimeRefuses as error:
        raise Unprocessable("runtime-refuses", str(error), pointer="/runtime") from error
    except (BudgetError, CompileError, CostError, DeviceError, PatternError, ScoresMissing) as error:
        raise Unprocessable("invalid-request", str(error)) from error


def wanted_metrics(request: JobRequest, inspection: Mapping[str, Any]) -> list[str]:
    """The metrics of the request and, unless it declines, the interactions. Raises Unprocessable for one not
    offered.
    """
    offered = inspection["available_metrics"]
    for metric in request.metrics:
        if metric not in offered:
            needs = ", ".join(sorted(SCORERS[metric].needs)) or "another task"
            raise Unprocessable(
                "metric-not-offered",
                f"A metric must suit the task {inspection['task']} and the data: {', '.join(offered)}. "
                f"Got {metric!r}, which needs {needs}. Pick another metric.",
            )
    wanted = with_interactions(request.metrics) if request.interactions else list(request.metrics)
    return [name for name in wanted if name in offered]


def offered_choices(inventory: Inventory, request: JobRequest) -> Choices:
    """Layer -> its schemes: the menu, a pinned layer's own scheme too, without those that its format or the
    runtime refuses.
    """
    pinned = expand_pins(inventory, request.pins)
    menu = table_schemes(request.schemes, {})
    forbidden = forbidden_in(inventory, table_schemes(request.schemes, request.pins), request.runtime)
    found = {}
    for layer in inventory.layers:
        names = dict.fromkeys((*menu, pinned[layer.name]) if layer.name in pinned else menu)
        found[layer.name] = tuple(
            name
            for name in names
            if name not in forbidden.get(layer.name, ()) and parse_scheme(name).refuses(layer) is None
        )
    return found


def interactions(
    lab: Lab, inputs: PlanningInputs, choices: Choices, samples: int
) -> NDArray[np.float64] | None:
    """The factor (layers, schemes, d) whose inner products are the interactions, zeros where nothing is
    offered; None where no metric of the table gives any.
    """
    table = inputs.table
    cells = [(layer, scheme) for layer in table.layer_names for scheme in table.schemes]
    if "gram_output" in table.metrics:
        found: Mapping[tuple[str, str], NDArray[Any]] = lab.sketches(choices)
    elif "gram_fisher" in table.metrics:
        found = lab.products(choices, samples)
    else:
        return None
    empty = np.zeros_like(next(iter(found.values())))
    rows = np.stack([found.get(cell, empty) for cell in cells])
    if rows.shape[1] <= len(cells):
        return rows.astype(np.float64).reshape(len(table.layers), len(table.schemes), -1)
    return factor_of(gram_matrix(rows), len(table.layers), len(table.schemes))


def asks_of(request: JobRequest) -> list[Ask]:
    """One question per budget of the request."""
    costs = cost_request(request.model_dump(mode="json")).members
    return [
        Ask(
            budget=budget,
            limits=tuple(request.limits),
            pins=dict(request.pins),
            ties=tuple(tuple(tie) for tie in request.ties),
            metric=request.metrics[0],
            time_limit_seconds=request.time_limit_seconds,
            gap=request.gap,
            runtime=request.runtime,
            costs=costs,
        )
        for budget in request.budgets
    ]


def _plan(context: JobContext, lab: Lab, search: Search, ask: Ask) -> str:
    """Solve, refine, prove and store the plan of one budget; its status."""
    tries = [search.request.chooser, search.request.evaluations]
    settings = digest(["search", ask.settings_digest(search.inputs.menu), *tries])
    with context.database.read() as session:
        known = plans.find(session, context.job.id, ask.budget, settings)
    if known is not None:
        return known.status
    compiled = compile_ask(search.inputs, ask)
    context.check()
    solution = solve(compiled.problem, gap=ask.gap, time_limit=ask.time_limit_seconds)
    plan, evidence = None, None
    tried: tuple[dict[str, Any], ...] = ()
    if solution.choice is not None:
        refined = CHOOSERS[search.request.chooser].choose(
            compiled,
            candidates(search.inputs, ask, compiled, solution, search.factor),
            lambda assignments: _choose(lab, assignments),
            predicted=screen(search.inputs, ask, compiled, search.factor),
            evaluations=search.request.evaluations,
        )
        plan = plan_of(
            search.inputs, ask, compiled, refined.assignment, solution=solution, source=refined.source
        )
        evidence = measured_evidence(lab, search.inputs, ask, refined.assignment, search.inspection)
        tried = _candidates_json(refined)
    failpoint("runner.writing_plan")
    context.write(
        lambda session: plans.insert(
            session,
            job_id=context.job.id,
            budget=ask.budget,
            settings_digest=settings,
            status=str(solution.status),
            digest=None if plan is None else plan.digest,
            document=None if plan is None else plan.as_json(),
            result=plan_result(ask, compiled, solution, plan, tried, search.inputs.sources),
            evidence=evidence,
            tenant=context.job.tenant,
        )
    )
    return str(solution.status)


def _choose(lab: Lab, assignments: Any) -> list[Measured]:
    return lab.measure(assignments, "choosing", Stage.SOLVING)


def _candidates_json(refined: Refined) -> tuple[dict[str, Any], ...]:
    """What was measured on the choosing part, in order: the named candidates, then each accepted move."""
    return tuple(
        {
            "source": step.source,
            "predicted": step.predicted,
            "measured": {"mean": step.measured.mean, "stderr": step.measured.stderr},
            "accepted": step.accepted,
        }
        for step in refined.trace
        if step.accepted or step.source != "local search"
    )


def _summary(search: Search, lab: Lab, statuses: list[str]) -> dict[str, Any]:
    inspection = search.inspection
    return {
        "inventory": search.inputs.inventory.as_json(),
        "task": inspection["task"],
        "samples": dict(inspection["samples"]),
        "divergence": inspection["divergence"],
        "metrics": list(search.inputs.table.metrics),
        "plans": [
            {"budget": budget, "status": status}
            for budget, status in zip(search.request.budgets, statuses, strict=True)
        ],
        "score_set": lab.score_set,
        "geometry": inspection.get("geometry"),
        "latency": None if search.timings is None else search.timings.as_json(),
    }
