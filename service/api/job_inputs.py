"""The planning inputs of a job, from what is stored: its inventory, its scores, its own request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from quant.costs import CostError
from quant.devices import DeviceError
from quant.digest import digest
from quant.kv_cache import Caches
from quant.layers import Inventory
from quant.lint import RuntimeRefuses
from quant.patterns import PatternError
from quant.plan import Calibration, Digests
from quant.schemes import parse_scheme
from search.budget import BudgetError
from search.compile import CompileError
from search.objectives.objective import ObjectiveError
from sensitivity.catalog import SCORERS
from sensitivity.contexts import context_of, without_context
from sensitivity.units import InspectUnit
from service.api.context import Context
from service.cascade import with_calibrated
from service.costing import LatencyMissing, cost_request, costs_of, geometry_in, timings_from_json
from service.db.repositories import calibrations, jobs, models, scores, units
from service.deciding import EACH, Deciding, deciding_of, with_roles
from service.errors import Conflict, ServiceError, Unprocessable
from service.interactions import paired
from service.picking import is_settled, settled
from service.planning.inputs import PlanningInputs, ScoresMissing, planning_menu, score_table, table_schemes
from service.records import JobRecord
from service.states import JobKind, JobState
from service.wire import LocalJobRequest

UNPROCESSABLE: dict[type[Exception], tuple[str, str | None]] = {
    RuntimeRefuses: ("runtime-refuses", "/runtime"),
    DeviceError: ("invalid-device", "/device_profile"),
    BudgetError: ("invalid-budget", "/budgets"),
    PatternError: ("unknown-layer", None),
    CostError: ("invalid-costs", None),
    CompileError: ("invalid-request", None),
    ObjectiveError: ("invalid-objective", "/objective"),
}
CONFLICTS: dict[type[Exception], str] = {ScoresMissing: "scores-missing", LatencyMissing: "latency-missing"}
PLANNING_ERRORS = (*UNPROCESSABLE, *CONFLICTS)


def planning_problem(error: Exception) -> ServiceError:
    """The answer to a question that the stored scores cannot be asked."""
    if type(error) in CONFLICTS:
        return Conflict(CONFLICTS[type(error)], str(error), headers={"Retry-After": "2"})
    slug, pointer = UNPROCESSABLE.get(type(error), ("invalid-request", None))
    return Unprocessable(slug, str(error), pointer=pointer)


def planning_inputs(
    context: Context,
    session: Session,
    job: JobRecord,
    metrics: Collection[str] | None = None,
    pins: Mapping[str, str] | None = None,
    costs: Mapping[str, Any] | None = None,
) -> PlanningInputs:
    """What a re-solve of a search job works on; `metrics`, `pins` and `costs` (members of a request that
    decide latency, energy and memory) default to the job's own.

    Those of a job that succeeded are kept for the next question of this kind, until scores are added.

    Raises Conflict while the job has nothing to plan with, and CostError, DeviceError or LatencyMissing.
    """
    if job.state is not JobState.SUCCEEDED or job.score_set is None:
        return _inputs(context, session, job, metrics, pins, costs)
    made_from = [
        context.tenant,
        job.id,
        job.version,
        scores.count(session, job.score_set),
        None if metrics is None else list(metrics),
        None if pins is None else list(pins.items()),
        None if costs is None else dict(costs),
    ]
    return context.kept.get(digest(made_from), lambda: _inputs(context, session, job, metrics, pins, costs))


def _inputs(
    context: Context,
    session: Session,
    job: JobRecord,
    metrics: Collection[str] | None,
    pins: Mapping[str, str] | None,
    costs: Mapping[str, Any] | None,
) -> PlanningInputs:
    request = settled(job.request, job.summary)
    facts = _facts(session, job)
    inventory = with_roles(request, Inventory.from_json(facts["inventory"]))
    wanted = list(metrics or request["metrics"])
    cheap, refined = str(request["metrics"][0]), request.get("refine_metric")
    if refined in wanted:
        wanted = list(dict.fromkeys((*wanted, cheap)))
    deciding = deciding_of(request, [without_context(name) for name in wanted], inventory, facts)
    named = request["pins"] if pins is None else pins
    schemes = table_schemes(request["schemes"], named)
    caches = Caches.of(request.get("kv_cache", ()), geometry_in(facts), named.values())
    timings = (job.summary or {}).get("latency")
    found = costs_of(
        cost_request(costs or {}, request),
        inventory,
        [parse_scheme(name) for name in schemes],
        geometry_in(facts),
        None if timings is None else timings_from_json(timings),
        caches,
    )
    for name in wanted:
        _check_context(deciding, name)
    wanted += [name for metric in wanted for name in deciding.compared(metric) if name not in wanted]
    rows = scores.list_all(session, str(job.score_set), deciding.all_measured)
    inputs = PlanningInputs(
        inventory=inventory,
        table=score_table(inventory, schemes, rows, wanted, costs=found, deciding=deciding, caches=caches),
        menu=planning_menu(request["schemes"], caches),
        digests=_digests(context, session, job),
        sources=found.sources,
        calibration=Calibration.of(request),
        corrections=tuple(request.get("corrections", ())),
        deciding=deciding,
        caches=caches,
        origin=_origin(context, session, job),
    )
    return inputs if refined is None or refined not in wanted else with_calibrated(inputs, cheap, refined)


def with_interactions(context: Context, job: JobRecord, inputs: PlanningInputs) -> PlanningInputs:
    """The inputs with the interactions that the search kept. Raises ObjectiveError for one that has none,
    Conflict for one that has not ended.
    """
    told = (job.summary or {}).get("interactions")
    if told is not None:
        return paired(context.store, told, inputs)
    if not job.finished:
        raise Conflict(
            "scores-missing",
            f"A job must have ended before its interactions can be asked for. Got a {job.state} job. Ask"
            " again when it has.",
            headers={"Retry-After": "2"},
        )
    raise ObjectiveError(
        f"The objective quadratic must be asked of a search that kept interactions. Got a {job.state} one"
        " without: it declined them, or ended before they were kept. Submit a search for it; what is scored"
        " already is not measured again."
    )


def _check_context(deciding: Deciding, metric: str) -> None:
    """A context must be one of the job's, and be named where each has its own plan."""
    context, names = context_of(metric), ", ".join(deciding.contexts) or "none"
    needed = (
        deciding.plans == EACH and bool(deciding.contexts) and SCORERS[without_context(metric)].by_context
    )
    if (context is None and needed) or (context is not None and context not in deciding.contexts):
        raise Unprocessable(
            "unknown-context",
            f"The context must be one of the job's: {names}. Got {context!r:.80}. Name one of them.",
            pointer="/context",
        )


def job_deciding(session: Session, job: JobRecord, metrics: Sequence[str]) -> Deciding:
    """What is measured for some metrics of a search job. Raises Conflict before it looked at its model."""
    facts = _facts(session, job)
    return deciding_of(
        job.request, metrics, with_roles(job.request, Inventory.from_json(facts["inventory"])), facts
    )


def search_job(job: JobRecord) -> JobRecord:
    """The job, which must be a search with a score set; its request with the metrics that `auto` picked."""
    if job.kind != JobKind.SEARCH:
        raise Conflict("not-a-search", f"Plans and scores must be asked of a search. Got a {job.kind} job.")
    request = settled(job.request, job.summary)
    if job.score_set is None or not is_settled(request):
        raise Conflict(
            "scores-missing",
            f"A job must have scores before it can be asked for them. Got a {job.state} job without any. "
            "Ask again when its stage is past loading.",
            headers={"Retry-After": "2"},
        )
    return replace(job, request=request)


def _facts(session: Session, job: JobRecord) -> Mapping[str, Any]:
    """Inventory and geometry of this job's model: as it planned with them, or while it runs from its own
    inspection.
    """
    inventory = jobs.inventory(session, job.id)
    stored: Mapping[str, Any] | None = (
        None if inventory is None else {**(job.summary or {}), "inventory": inventory}
    )
    if stored is None:
        request = LocalJobRequest.model_validate(dict(job.request))
        unit = InspectUnit(request.takes_part, tuple(request.exclude))
        inspection = units.get(session, str(job.score_set), unit.key)
        stored = inspection.facts if inspection else None
    if stored is None:
        raise Conflict(
            "scores-missing",
            f"A job must have looked at its model before it can plan. Got a {job.state} job that has not. "
            "Ask again when its stage is past loading.",
            headers={"Retry-After": "2"},
        )
    return stored


def _origin(context: Context, session: Session, job: JobRecord) -> Mapping[str, Any] | None:
    model = models.get(session, job.request["model"], context.tenant)
    return None if model is None else model.origin


def _digests(context: Context, session: Session, job: JobRecord) -> Digests:
    model = models.get(session, job.request["model"], context.tenant)
    calibration = calibrations.get(session, job.request["calibration"], context.tenant)
    return Digests(
        model=model.digest if model else None,
        calibration=calibration.digest if calibration else None,
        scores=job.score_set,
    )
