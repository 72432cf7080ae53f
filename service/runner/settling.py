"""What a search says before it measures: the metrics that `auto` means, and the estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.db.repositories import leases, scores
from service.estimate import estimate
from service.picking import pick
from service.runner.context import JobContext
from service.states import JobKind
from service.wire import JobRequest

HIDDEN = ("task", "divergence", "layers", "parameters", "excluded")
"""Members of the estimate that a job's summary has elsewhere."""


def settle(
    context: JobContext, score_set: str, request: JobRequest, inspection: Mapping[str, Any]
) -> tuple[JobRequest, dict[str, Any]]:
    """The request with the metrics it means, and what its job's summary holds from now on."""
    workers = context.settings.workers
    settled, picked = pick(
        request, inspection, workers, lambda way: float(estimate(way, inspection, workers)["seconds"])
    )
    stored = context.read(lambda session: scores.keys(session, score_set))
    found = estimate(settled, inspection, workers, stored)
    said = {
        "picked": picked,
        "estimate": {name: value for name, value in found.items() if name not in HIDDEN},
    }
    if context.job.kind == JobKind.SEARCH:
        context.write(lambda session: leases.set_summary(session, context.job.id, context.epoch, said))
    return settled, said
