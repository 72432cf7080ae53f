"""The planning inputs of a job, from what is stored: its inventory, its scores, its own request."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy.orm import Session

from quant.costs import CostError, latency_from_mapping
from quant.layers import Inventory
from quant.patterns import PatternError
from quant.plan import Digests
from search.budget import BudgetError
from search.compile import CompileError
from sensitivity.units import InspectUnit
from service.api.context import Context
from service.db.repositories import calibrations, models, scores, units
from service.errors import Conflict, ServiceError, Unprocessable
from service.planning import PlanningInputs, ScoresMissing, score_table, table_schemes
from service.records import JobRecord
from service.states import JobKind
from service.wire import JobRequest

PLANNING_ERRORS = (PatternError, CompileError, BudgetError, CostError, ScoresMissing)


def planning_problem(error: Exception) -> ServiceError:
    """The answer to a question that the stored scores cannot be asked."""
    match error:
        case ScoresMissing():
            return Conflict("scores-missing", str(error), headers={"Retry-After": "2"})
        case BudgetError():
            return Unprocessable("invalid-budget", str(error), pointer="/budgets")
        case PatternError():
            return Unprocessable("unknown-layer", str(error))
        case CostError():
            return Unprocessable("invalid-latency", str(error), pointer="/latency_ns")
    return Unprocessable("invalid-request", str(error))


def planning_inputs(
    context: Context,
    session: Session,
    job: JobRecord,
    metrics: Collection[str] | None = None,
    pins: Mapping[str, str] | None = None,
) -> PlanningInputs:
    """What a re-solve of a search job works on; `metrics` and `pins` default to the job's own.

    Raises Conflict while the job has nothing to plan with.
    """
    request = job.request
    inventory = _inventory(session, job)
    wanted = list(metrics or request["metrics"])
    schemes = table_schemes(request["schemes"], request["pins"] if pins is None else pins)
    latency = request.get("latency_ns")
    rows = scores.list_all(session, str(job.score_set), wanted)
    return PlanningInputs(
        inventory=inventory,
        table=score_table(
            inventory, schemes, rows, wanted, None if latency is None else latency_from_mapping(latency)
        ),
        menu=table_schemes(request["schemes"], {}),
        digests=_digests(context, session, job),
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


def _inventory(session: Session, job: JobRecord) -> Inventory:
    """The layers that take part in this job: from its summary, or while it runs from its own inspection."""
    stored = (job.summary or {}).get("inventory")
    if stored is None:
        request = JobRequest.model_validate(dict(job.request))
        unit = InspectUnit(request.takes_part, tuple(request.exclude))
        inspection = units.get(session, str(job.score_set), unit.key)
        stored = inspection.facts["inventory"] if inspection else None
    if stored is None:
        raise Conflict(
            "scores-missing",
            f"A job must have looked at its model before it can plan. Got a {job.state} job that has not. "
            "Ask again when its stage is past loading.",
            headers={"Retry-After": "2"},
        )
    return Inventory.from_json(stored)


def _digests(context: Context, session: Session, job: JobRecord) -> Digests:
    model = models.get(session, job.request["model"], context.tenant)
    calibration = calibrations.get(session, job.request["calibration"], context.tenant)
    return Digests(
        model=model.digest if model else None,
        calibration=calibration.digest if calibration else None,
        scores=job.score_set,
    )
