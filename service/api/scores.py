"""Scores of a job: pages of JSON, or one CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from sensitivity.catalog import with_interactions
from service.api.context import LARGEST_PAGE, After, Context, Ctx, Limit
from service.api.job_inputs import search_job
from service.api.job_resources import Score
from service.api.jobs import JobId
from service.api.lookup import find_job
from service.api.resources import Page
from service.db.repositories import scores
from service.db.repositories.scores import ScoreKey
from service.errors import Unprocessable
from service.planning import table_schemes
from service.records import JobRecord, ScoreRecord

router = APIRouter(prefix="/v1/jobs", tags=["scores"])
COLUMNS = ("layer", "scheme", "metric", "value", "stderr", "samples")

MetricName = Annotated[str | None, Query(max_length=100, description="Only this metric.")]
Format = Annotated[Literal["json", "csv"], Query(alias="format", description="csv gives all rows at once.")]


@router.get("/{job_id}/scores", response_model=Page[Score])
def list_scores(
    *,
    job_id: JobId,
    context: Ctx,
    limit: Limit = 200,
    cursor: After = None,
    metric: MetricName = None,
    form: Format = "json",
) -> Response | Page[Score]:
    """The scores that are stored for the job's schemes and metrics, ordered by layer, scheme and metric."""
    with context.database.read() as session:
        job = search_job(find_job(context, session, job_id))
    metrics = _metrics(job, metric)
    if form == "csv":
        name = f'attachment; filename="bitplan-{job.id}-scores.csv"'
        lines = _csv(_all_rows(context, job, metrics))
        return StreamingResponse(lines, media_type="text/csv", headers={"Content-Disposition": name})
    kind = f"scores of {job_id} {metric}"
    after = None if cursor is None else tuple(context.cursors.read(kind, cursor))
    rows = _rows(context, job, metrics, limit, after)
    more = context.cursors.make(kind, _key(rows[-1])) if len(rows) == limit else None
    return Page(items=[Score.of(row) for row in rows], next_cursor=more)


def _metrics(job: JobRecord, metric: str | None) -> list[str]:
    named = job.request["metrics"]
    measured = with_interactions(named) if job.request["interactions"] else named
    if metric is None:
        return measured
    if metric not in measured:
        raise Unprocessable(
            "unknown-metric",
            f"metric must be one that the job measures: {', '.join(measured)}. Got {metric!r}. Pick one of "
            "them.",
            pointer="/query/metric",
        )
    return [metric]


def _rows(
    context: Context, job: JobRecord, metrics: list[str], limit: int, after: ScoreKey | None
) -> tuple[ScoreRecord, ...]:
    schemes = table_schemes(job.request["schemes"], job.request["pins"])
    with context.database.read() as session:
        return scores.list_page(session, str(job.score_set), limit, after, metrics=metrics, schemes=schemes)


def _all_rows(context: Context, job: JobRecord, metrics: list[str]) -> Iterator[ScoreRecord]:
    after: ScoreKey | None = None
    while rows := _rows(context, job, metrics, LARGEST_PAGE, after):
        yield from rows
        after = _key(rows[-1])


def _key(row: ScoreRecord) -> ScoreKey:
    return (row.layer, row.scheme, row.metric)


def _csv(rows: Iterator[ScoreRecord]) -> Iterator[str]:
    yield _line(COLUMNS)
    for row in rows:
        texts = (cell(row.layer), cell(row.scheme), cell(row.metric))
        yield _line((*texts, repr(row.value), "" if row.stderr is None else repr(row.stderr), row.samples))


def _line(values: tuple[object, ...]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue()


def cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    >>> cell("=1+1"), cell("model.layers.0")
    ("'=1+1", 'model.layers.0')
    """
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
