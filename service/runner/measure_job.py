"""The handler of measurements: evidence for a plan that was solved from stored scores alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from search.objectives.catalog import DEFAULT
from sensitivity.contexts import without_context
from service.costing import without_costs
from service.db.repositories import plans
from service.picking import settled
from service.planning.ask import Ask
from service.runner.context import JobContext, JobFailed
from service.runner.evidence import measured_evidence
from service.runner.inputs import planned
from service.runner.search_job import asks_of, open_lab, scored
from service.runner.solving import losses_of
from service.wire import JobRequest, LocalJobRequest


def run_measurement(context: JobContext) -> Mapping[str, Any]:
    """Measure the plan that the job names, beside its rivals, and attach the evidence."""
    record, plan, search = context.read(lambda session: planned(context, session))
    request = measured_request(settled(search.request, search.summary), record.result["ask"])
    with open_lab(context, request) as lab:
        found = scored(context, lab, request)
        ask = replace(asks_of(request)[0], metric=str(record.result["metric"]))
        losses = losses_of(lab, found, str(ask.metric))
        evidence = measured_evidence(lab, found.inputs, ask, plan.assignment, found.inspection, losses)
    context.write(lambda session: plans.set_evidence(session, record.id, evidence))
    return {"plan": record.id, "verdict": evidence["verdict"]}


def measured_request(search: Mapping[str, Any], ask: Mapping[str, Any]) -> JobRequest:
    """The search's request with what this plan asked; the layers that take part and the order of the metrics
    stay those of the search, what the plan was solved for no longer matters, and only a plan that the
    refining metric decides or limits needs it. No candidates are made, so interactions are measured only
    where the plan is solved by them.

    Raises JobFailed where the two make no request any more.
    """
    request = {**without_costs(search), **ask, "objective": DEFAULT}
    refined = search.get("refine_metric")
    question = Ask.of(request, ask["budgets"][0], ask["metrics"][0])
    own = [*ask["metrics"], *map(without_context, question.named_metrics)]
    changes = {
        "metrics": list(dict.fromkeys((*search["metrics"], *(name for name in own if name != refined)))),
        "refine_metric": refined if refined in own else None,
        "interactions": False,
        "targets": [],
    }
    try:
        include = list(LocalJobRequest.model_validate(dict(search)).takes_part)
        return LocalJobRequest.model_validate({**request, **changes, "include": include})
    except ValidationError as error:
        raise JobFailed(
            "plan-not-usable",
            f"The plan must come from a request that is still taken. Got: {error.errors()[0]['msg']}"
            " Search again.",
        ) from error
