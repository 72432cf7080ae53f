"""What is there when everything has come to rest: rows, files, processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sqlalchemy import select

from service.db.engine import Database
from service.db.tables import (
    AttemptRow,
    BlobRow,
    CalibrationRow,
    EventRow,
    FaultRow,
    JobRow,
    PlanRow,
    ScoreRow,
    UnitRow,
    UploadRow,
    WebhookRow,
)
from service.store.blobs import digest_of

Row = Mapping[str, Any]
TABLES: Mapping[str, Any] = {
    "jobs": JobRow,
    "events": EventRow,
    "scores": ScoreRow,
    "units": UnitRow,
    "plans": PlanRow,
    "faults": FaultRow,
    "attempts": AttemptRow,
    "uploads": UploadRow,
    "webhooks": WebhookRow,
    "calibrations": CalibrationRow,
    "blobs": BlobRow,
}
LEFT_OUT = frozenset({"unit"})
"""Columns that no check needs and that make a stored state long."""


@dataclass(frozen=True)
class Final:
    """The end of a run.

    files        files that can be seen in the store, by the digest that names them -> the digest of what is in them
    again        (plan, its layers, the layers of the plan that was solved again from the rows)
    expected     scores of an undisturbed run: (layer, scheme, metric) -> [value, stderr, samples]
    told         what the receiver of webhooks was told: [job, type]
    strays       processes that outlived the service
    """

    jobs: Sequence[Row] = ()
    events: Sequence[Row] = ()
    scores: Sequence[Row] = ()
    units: Sequence[Row] = ()
    plans: Sequence[Row] = ()
    faults: Sequence[Row] = ()
    attempts: Sequence[Row] = ()
    uploads: Sequence[Row] = ()
    webhooks: Sequence[Row] = ()
    calibrations: Sequence[Row] = ()
    blobs: Sequence[Row] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    again: Sequence[tuple[str, Any, Any]] = ()
    expected: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    told: Sequence[Sequence[str]] = ()
    strays: Sequence[str] = ()

    def save(self, path: Path) -> None:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        path.write_text(json.dumps(values, default=str), encoding="utf-8")


def load_final(path: Path) -> Final:
    """The inverse of `Final.save`."""
    return Final(**json.loads(path.read_text(encoding="utf-8")))


def rows_of(database: Database) -> dict[str, list[dict[str, Any]]]:
    """Every row that a check asks for, as plain JSON, in the order of its key."""
    found = {}
    with database.read() as session:
        for name, table in TABLES.items():
            columns = [column for column in table.__table__.columns if column.name not in LEFT_OUT]
            keys = [column for column in table.__table__.columns if column.primary_key]
            rows = session.execute(select(*columns).order_by(*keys)).mappings()
            found[name] = [json.loads(json.dumps(dict(row), default=str)) for row in rows]
    return found


def files_of(data_dir: Path) -> dict[str, str]:
    """Every file that can be seen in the store -> the digest of its content."""
    return {
        path.name: digest_of(path) for path in sorted((data_dir / "blobs").glob("*/*/*")) if path.is_file()
    }
