"""The trade-off of a job at a glance: its Pareto-optimal plans over one resource."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from search.budget import parse_limits
from search.objectives.catalog import DEFAULT
from sensitivity.contexts import in_context
from service.api.context import Ctx
from service.api.guarded import Guarded
from service.api.job_inputs import PLANNING_ERRORS, planning_inputs, planning_problem, search_job
from service.api.job_resources import Frontier, FrontierPoint
from service.api.jobs import JobId
from service.api.lookup import find_job
from service.deciding import deciding_metric
from service.fields import Metric
from service.planning.answer import frontier_of
from service.planning.ask import Ask, limited_metrics

router = APIRouter(prefix="/v1/jobs", tags=["plans"], route_class=Guarded)

ResourceName = Annotated[
    str, Query(max_length=100, description="bytes, bits_per_weight, bops, latency_ns ...")
]
ContextName = Annotated[
    str | None, Query(alias="context", max_length=100, description="One context of the job's own plans.")
]
MetricName = Annotated[
    Metric | None, Query(description="A metric of the job; the one that decides when left out.")
]
Points = Annotated[int, Query(ge=2, le=200, description="At most this many plans.")]
Between = Annotated[
    str | None,
    Query(
        alias="between",
        max_length=200,
        pattern="^[^,]+,[^,]+$",
        description='Two totals, "1 MiB,2 MiB": every Pareto-optimal plan between them, supported or not.',
    ),
]
WithLayers = Annotated[bool, Query(description="Also give every plan's layers.")]


@router.get("/{job_id}/frontier")
def get_frontier(
    *,
    job_id: JobId,
    context: Ctx,
    resource: ResourceName = "bytes",
    metric: MetricName = None,
    of: ContextName = None,
    points: Points = 100,
    stretch: Between = None,
    layers: WithLayers = False,
) -> Frontier:
    """The supported Pareto-optimal plans, predicted from stored scores; pins, ties and limits of the job
    hold. With `between` every Pareto-optimal plan between two totals, from the top down, each proven.
    """
    try:
        with context.database.read() as session:
            job = search_job(find_job(context, session, job_id))
            name = metric or deciding_metric(job.request)
            name = in_context(name, of) if of else name
            limited = limited_metrics(parse_limits(job.request["limits"]))
            inputs = planning_inputs(context, session, job, list(dict.fromkeys((name, *limited))))
        ask = Ask.of({**job.request, "objective": DEFAULT}, "", name)
        found = frontier_of(inputs, ask, resource, points, None if stretch is None else stretch.split(","))
    except PLANNING_ERRORS as error:
        raise planning_problem(error) from None
    items = [FrontierPoint(**(point if layers else point | {"layers": None})) for point in found.pop("items")]
    return Frontier(resource=resource, metric=name, items=items, **found)
