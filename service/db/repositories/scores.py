"""Scores: one row per (score set, layer, scheme, metric), written once."""

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from sqlalchemy import Select, bindparam, func, select, tuple_
from sqlalchemy.orm import Session

from service.db.repositories.rows import columns_of, insert_or_keep, record_of
from service.db.tables import ScoreRow
from service.records import ScoreRecord

ScoreKey = tuple[str, str, str]
AFTER = ("after_layer", "after_scheme", "after_metric")
"""The parameters that are the key before a later page."""
COLUMNS = columns_of(ScoreRecord, ScoreRow)


def insert(session: Session, records: Iterable[ScoreRecord]) -> tuple[ScoreRecord, ...]:
    """Store scores, each key once; gives those that were stored before with another value (they stay as
    they are).
    """
    disagreeing = []
    for record in records:
        values = {name: getattr(record, name) for name in ScoreRow.__table__.columns.keys()}  # noqa: SIM118
        if not insert_or_keep(session, ScoreRow, values):
            kept = session.get_one(ScoreRow, _primary_key(record))
            if (kept.value, kept.stderr, kept.samples) != (record.value, record.stderr, record.samples):
                disagreeing.append(record)
    return tuple(disagreeing)


def _primary_key(record: ScoreRecord) -> tuple[str, str, str, str]:
    return (record.score_set, record.layer, record.scheme, record.metric)


def get(session: Session, score_set: str, layer: str, scheme: str, metric: str) -> ScoreRecord | None:
    """One score, or None."""
    row = session.get(ScoreRow, (score_set, layer, scheme, metric))
    return None if row is None else record_of(ScoreRecord, row)


def of_scheme(
    session: Session, score_set: str, scheme: str, layers: Collection[str]
) -> dict[tuple[str, str], ScoreRecord]:
    """(layer, metric) -> the score of one scheme there, for some layers."""
    query = select(ScoreRow).where(
        ScoreRow.score_set == score_set, ScoreRow.scheme == scheme, ScoreRow.layer.in_(sorted(set(layers)))
    )
    return {(row.layer, row.metric): record_of(ScoreRecord, row) for row in session.scalars(query)}


def keys(session: Session, score_set: str) -> frozenset[ScoreKey]:
    """The (layer, scheme, metric) that are stored."""
    query = select(ScoreRow.layer, ScoreRow.scheme, ScoreRow.metric).where(ScoreRow.score_set == score_set)
    return frozenset((layer, scheme, metric) for layer, scheme, metric in session.execute(query))


def count(session: Session, score_set: str) -> int:
    """How many scores a set has. They are written once, so as long as it is the same they are the same."""
    query = select(func.count()).select_from(ScoreRow).where(ScoreRow.score_set == score_set)
    return int(session.execute(query).scalar_one())


def list_all(
    session: Session, score_set: str, metrics: Collection[str] | None = None
) -> tuple[ScoreRecord, ...]:
    """Every score of a set, or those of `metrics`, ordered by (layer, scheme, metric)."""
    query = select(*COLUMNS).where(ScoreRow.score_set == score_set)
    if metrics is not None:
        query = query.where(ScoreRow.metric.in_(sorted(metrics)))
    rows = session.execute(query.order_by(ScoreRow.layer, ScoreRow.scheme, ScoreRow.metric))
    return tuple(ScoreRecord(*row) for row in rows)


def list_page(
    session: Session,
    score_set: str,
    limit: int = 200,
    after: ScoreKey | None = None,
    *,
    metrics: Collection[str] | None = None,
    schemes: Collection[str] | None = None,
) -> tuple[ScoreRecord, ...]:
    """At most `limit` scores behind the key `after`, ordered by (layer, scheme, metric); with `metrics` or
    `schemes`, only theirs.
    """
    statement = _page_statement(after is not None, metrics is not None, schemes is not None)
    values = {
        "score_set": score_set,
        "page_size": limit,
        "metrics": sorted(metrics or ()),
        "schemes": sorted(schemes or ()),
        **dict(zip(AFTER, after or (), strict=False)),
    }
    return tuple(ScoreRecord(*row) for row in session.execute(statement, values))


@cache
def _page_statement(later: bool, some_metrics: bool, some_schemes: bool) -> Select[Any]:
    """Made once: making it costs more than reading a page."""
    key = (ScoreRow.layer, ScoreRow.scheme, ScoreRow.metric)
    query = select(*COLUMNS).where(ScoreRow.score_set == bindparam("score_set"))
    if some_metrics:
        query = query.where(ScoreRow.metric.in_(bindparam("metrics", expanding=True)))
    if some_schemes:
        query = query.where(ScoreRow.scheme.in_(bindparam("schemes", expanding=True)))
    if later:
        query = query.where(
            tuple_(*key) > tuple_(*(bindparam(name, type_=ScoreRow.layer.type) for name in AFTER))
        )
    return query.order_by(*key).limit(bindparam("page_size"))
