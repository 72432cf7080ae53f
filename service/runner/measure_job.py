"""The handler of measurements: evidence for a plan that was solved from stored scores alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.plan import plan_from_json
from service.db.repositories import jobs, plans
from service.runner.context import JobContext, JobFailed
from service.runner.evidence import measured_evidence
from service.runner.search_job import asks_of, open_lab, scored
from service.wire import JobRequest


def run_measurement(context: JobContext) -> Mapping[str, Any]:
    """Measure the plan that the job names, beside its rivals, and attach the evidence."""
    plan_id = str(context.job.request["plan"])
    with context.database.read() as session:
        plan = plans.get(session, plan_id, context.job.tenant)
        search = None if plan is None else jobs.get(session, plan.job_id, context.job.tenant)
    if plan is None or search is None or plan.document is None:
        raise JobFailed(
            "plan-not-usable", f"The plan must exist and fit its budget. Got {plan_id}. Solve again."
        )
    request = _request(search.request, plan.result["ask"])
    with open_lab(context, request) as lab:
        found = scored(context, lab, request)
        ask = asks_of(request)[0]
        assignment = plan_from_json(plan.document).assignment
        evidence = measured_evidence(lab, found.inputs, ask, assignment, found.inspection)
    context.write(lambda session: plans.set_evidence(session, plan_id, evidence))
    return {"plan": plan_id, "verdict": evidence["verdict"]}


def _request(search: Mapping[str, Any], ask: Mapping[str, Any]) -> JobRequest:
    """The search's request with what this plan asked; the layers that take part stay those of the search."""
    include = JobRequest.model_validate(dict(search)).takes_part
    metrics = dict.fromkeys((*ask["metrics"], *search["metrics"]))
    return JobRequest.model_validate({**search, **ask, "include": list(include), "metrics": list(metrics)})
