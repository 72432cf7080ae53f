"""Scores of a job: pages of JSON, or one CSV or Parquet file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from quant.kv_cache import FULL, cache_scheme, is_cache, scheme_name
from quant.schemes import SchemeError
from sensitivity.catalog import DECOUPLED
from service.api.context import LARGEST_PAGE, After, Context, Ctx, Limit
from service.api.guarded import Guarded
from service.api.job_inputs import job_deciding, search_job
from service.api.job_resources import Score, score_members
from service.api.jobs import JobId
from service.api.lookup import find_job
from service.api.pages import page_response
from service.api.resources import Json, Page
from service.api.score_parquet import MEDIA_TYPE, parquet
from service.db.repositories import scores, units
from service.db.repositories.scores import ScoreKey
from service.deciding import scored_metrics
from service.draws import Draws
from service.errors import Unprocessable
from service.ingest.parquet_text import require_pyarrow
from service.planning.inputs import table_schemes
from service.records import JobRecord, ScoreRecord

router = APIRouter(prefix="/v1/jobs", tags=["scores"], route_class=Guarded)
COLUMNS = ("layer", "scheme", "metric", "value", "stderr", "samples")
PAIRED = ("difference", "difference_stderr")

MetricName = Annotated[str | None, Query(max_length=100, description="Only this metric.")]
Against = Annotated[
    str | None,
    Query(max_length=200, description="Also give each score's difference from that of this scheme."),
]
Format = Annotated[
    Literal["json", "csv", "parquet"],
    Query(alias="format", description="csv and parquet give all rows at once."),
]


@router.get(
    "/{job_id}/scores",
    response_model=Page[Score],
    responses={
        200: {
            "content": {
                "text/csv": {"schema": {"type": "string"}},
                MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
            }
        }
    },
)
def list_scores(
    *,
    job_id: JobId,
    context: Ctx,
    limit: Limit = 200,
    cursor: After = None,
    metric: MetricName = None,
    against: Against = None,
    form: Format = "json",
) -> Response:
    """The scores that are stored for the job's schemes and metrics, ordered by layer, scheme and metric."""
    with context.database.read() as session:
        job = search_job(find_job(context, session, job_id))
        metrics, other = _metrics(session, job, metric), _scheme(job, against)
        if form != "json":
            pages = _pages(context, job, metrics)
            found = (score for rows in pages for score in _scores(context, rows, other))
            return _file(job, form, found, COLUMNS if other is None else (*COLUMNS, *PAIRED))
        kind = f"scores of {job_id} {metric}"
        after = None if cursor is None else tuple(context.cursors.read(kind, cursor))
        rows = _rows(session, job, metrics, limit, after)
    more = context.cursors.make(kind, _key(rows[-1])) if len(rows) == limit else None
    return page_response(_scores(context, rows, other), more)


def _file(job: JobRecord, form: str, rows: Iterator[Json], columns: Sequence[str]) -> StreamingResponse:
    """All rows as a download."""
    headers = {"Content-Disposition": f'attachment; filename="bitplan-{job.id}-scores.{form}"'}
    if form == "csv":
        return StreamingResponse(_csv(rows, columns), media_type="text/csv", headers=headers)
    require_pyarrow("format=parquet", "Ask for csv", "/query/format")
    return StreamingResponse(parquet(rows, columns), media_type=MEDIA_TYPE, headers=headers)


def _metrics(session: Session, job: JobRecord, metric: str | None) -> list[str]:
    """The metrics that are stored for the job: those of roles and contexts by their own names."""
    named, refined = job.request["metrics"], job.request.get("refine_metric")
    measured = scored_metrics(named, refined, interactions=job.request["interactions"])
    measured += [] if refined is None else [refined]
    if DECOUPLED in named or job.request.get("contexts"):
        measured = job_deciding(session, job, measured).all_measured
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


def _scheme(job: JobRecord, against: str | None) -> str | None:
    """The scheme to compare with, in canonical spelling."""
    schemes = _schemes(job)
    name = against
    with suppress(SchemeError):
        name = None if against is None else scheme_name(against)
    if name is not None and name not in schemes:
        raise Unprocessable(
            "unknown-scheme",
            f"against must be a scheme of the job: {', '.join(schemes)}. Got {against!r:.80}. Pick one of "
            "them.",
            pointer="/query/against",
        )
    return name


def _scores(context: Context, rows: Sequence[ScoreRecord], against: str | None) -> list[Json]:
    """A page of rows as answers; `against` a scheme, each with its difference from that scheme's score."""
    if against is None or not rows:
        return [score_members(row) for row in rows]
    score_set = rows[0].score_set
    with context.database.read() as session:
        others = scores.of_scheme(session, score_set, against, {row.layer for row in rows})
        keys = {row.unit_key for row in (*rows, *others.values())}
        found = units.get_many(session, score_set, keys)
    draws = Draws(found.get, context.store.get_array)
    pairs = [(row, others.get((row.layer, row.metric))) for row in rows]
    return [
        score_members(row) if other is None else score_members(row, *draws.difference(row, other))
        for row, other in pairs
    ]


def _rows(
    session: Session, job: JobRecord, metrics: list[str], limit: int, after: ScoreKey | None
) -> tuple[ScoreRecord, ...]:
    schemes = _schemes(job)
    return scores.list_page(session, str(job.score_set), limit, after, metrics=metrics, schemes=schemes)


def _schemes(job: JobRecord) -> tuple[str, ...]:
    """Those of weights, and then those of caches where they are decided."""
    kinds, pins = job.request.get("kv_cache", ()), job.request["pins"]
    pinned = [scheme for scheme in pins.values() if is_cache(scheme)]
    caches = dict.fromkeys((*map(cache_scheme, (FULL, *kinds)), *pinned)) if kinds else ()
    return (*table_schemes(job.request["schemes"], pins), *caches)


def _pages(context: Context, job: JobRecord, metrics: list[str]) -> Iterator[tuple[ScoreRecord, ...]]:
    """All rows, each page read in a transaction of its own: a slow reader holds none."""
    after: ScoreKey | None = None
    while True:
        with context.database.read() as session:
            rows = _rows(session, job, metrics, LARGEST_PAGE, after)
        if not rows:
            return
        yield rows
        after = _key(rows[-1])


def _key(row: ScoreRecord) -> ScoreKey:
    return (row.layer, row.scheme, row.metric)


def _csv(rows: Iterator[Json], columns: Sequence[str]) -> Iterator[str]:
    yield _line(tuple(columns))
    for row in rows:
        yield _line(tuple(_text(row[name]) for name in columns))


def _text(value: str | float | None) -> str:
    """Numbers with all their digits, nothing for null."""
    if value is None:
        return ""
    return cell(value) if isinstance(value, str) else repr(value)


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
