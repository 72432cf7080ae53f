"""The trade-off of a job at a glance: its Pareto-optimal plans over one resource."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.context import Ctx
from service.api.job_inputs import PLANNING_ERRORS, planning_inputs, planning_problem, search_job
from service.api.job_resources import Frontier, FrontierPoint
from service.api.jobs import JobId
from service.api.lookup import find_job
from service.costing import cost_request
from service.planning import Ask, frontier_of
from service.wire import Metric

router = APIRouter(prefix="/v1/jobs", tags=["plans"])

ResourceName = Annotated[
    str, Query(max_length=100, description="bytes, bits_per_weight, bops, latency_ns ...")
]
MetricName = Annotated[Metric | None, Query(description="A metric of the job; its first one when left out.")]
Points = Annotated[int, Query(ge=2, le=200, description="At most this many plans.")]
WithLayers = Annotated[bool, Query(description="Also give every plan's layers.")]


@router.get("/{job_id}/frontier")
def get_frontier(
    *,
    job_id: JobId,
    context: Ctx,
    resource: ResourceName = "bytes",
    metric: MetricName = None,
    points: Points = 100,
    layers: WithLayers = False,
) -> Frontier:
    """The supported Pareto-optimal plans, predicted from stored scores; pins, ties and limits of the job
    hold.
    """
    try:
        with context.database.read() as session:
            job = search_job(find_job(context, session, job_id))
            name = metric or str(job.request["metrics"][0])
            inputs = planning_inputs(context, session, job, [name])
        ask = Ask(
            budget="",
            limits=tuple(job.request["limits"]),
            pins=job.request["pins"],
            ties=tuple(tuple(tie) for tie in job.request["ties"]),
            metric=name,
            runtime=job.request.get("runtime"),
            costs=cost_request(job.request).members,
        )
        found = frontier_of(inputs, ask, resource, points)
    except PLANNING_ERRORS as error:
        raise planning_problem(error) from None
    items = [FrontierPoint(**(point if layers else point | {"layers": None})) for point in found]
    return Frontier(resource=resource, metric=name, items=items)
