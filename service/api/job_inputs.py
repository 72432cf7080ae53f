"""The planning inputs of a job, from what is stored: its inventory, its scores, its own request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy.orm import Session

from quant.costs import CostError
from quant.devices import DeviceError
from quant.layers import Inventory
from quant.lint import RuntimeRefuses
from quant.patterns import PatternError
from quant.plan import Calibration, Digests
from quant.schemes import parse_scheme
from search.budget import BudgetError
from search.compile import CompileError
from sensitivity.units import InspectUnit
from service.api.context import Context
from service.costing import LatencyMissing, cost_request, costs_of, geometry_in, timings_from_json
from service.db.repositories import calibrations, models, scores, units
from service.errors import Conflict, ServiceError, Unprocessable
from service.planning import PlanningInputs, ScoresMissing, score_table, table_schemes
from service.records import JobRecord
from service.states import JobKind
from service.wire import JobRequest

UNPROCESSABLE: dict[type[Exception], tuple[str, str | None]] = {
    RuntimeRefuses: ("runtime-refuses", "/runtime"),
    DeviceError: ("invalid-device", "/device_profile"),
    BudgetError: ("invalid-budget", "/budgets"),
    PatternError: ("unknown-layer", None),
    CostError: ("invalid-costs", None),
    CompileError: ("invalid-request", None),
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

    Raises Conflict while the job has nothing to plan with, and CostError, DeviceError or LatencyMissing.
    """
    request = job.request
    facts = _facts(session, job)
    inventory = Inventory.from_json(facts["inventory"])
    wanted = list(metrics or request["metrics"])
    schemes = table_schemes(request["schemes"], request["pins"] if pins is None else pins)
    timings = (job.summary or {}).get("latency")
    found = costs_of(
        cost_request(costs or {}, request),
        inventory,
        [parse_scheme(name) for name in schemes],
        geometry_in(facts),
        None if timings is None else timings_from_json(timings),
    )
    rows = scores.list_all(session, str(job.score_set), wanted)
    return PlanningInputs(
        inventory=inventory,
        table=score_table(inventory, schemes, rows, wanted, costs=found),
        menu=table_schemes(request["schemes"], {}),
        digests=_digests(context, session, job),
        sources=found.sources,
        calibration=Calibration.of(request),
        corrections=tuple(request.get("corrections", ())),
    )


def search_job(job: JobRecord) -> JobRecord:
    """The job, which must be a search with a score set."""
    if job.kind != JobKind.SEARCH:
        raise Conflict("not-a-search", f"Plans and scores must be asked of a search. Got a {job.kind} job.")
    if job.score_set is None:
        raise Conflict(
            "scores-missing",
            f"A job must have scores before it can be asked for them. Got a {job.state} job without any. "
            "Ask again when its stage is past loading.",
            headers={"Retry-After": "2"},
        )
    return job


def _facts(session: Session, job: JobRecord) -> Mapping[str, Any]:
    """Inventory and geometry of this job's model: from its summary, or while it runs from its own
    inspection.
    """
    stored: Mapping[str, Any] | None = job.summary
    if stored is None or stored.get("inventory") is None:
        request = JobRequest.model_validate(dict(job.request))
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


def _digests(context: Context, session: Session, job: JobRecord) -> Digests:
    model = models.get(session, job.request["model"], context.tenant)
    calibration = calibrations.get(session, job.request["calibration"], context.tenant)
    return Digests(
        model=model.digest if model else None,
        calibration=calibration.digest if calibration else None,
        scores=job.score_set,
    )
