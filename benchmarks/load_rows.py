"""The database of `benchmarks/load.py`: jobs as runners leave them, their events and scores, in bulk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import Connection, text

from benchmarks.resolve import inventory
from service.access import Scope, new_key
from service.api.context import Context
from service.db.repositories import calibrations, keys, models
from service.ids import new_id
from service.states import TERMINAL, InputState, JobKind, JobState
from service.wire import JobRequest

TENANT = "load"
LAYERS = 125
SCHEMES = ("w2", "w3", "w4", "w5", "w6", "w8", "fp8", "mxfp4")
METRIC = "output_kl"
ROWS_PER_SET = LAYERS * len(SCHEMES)
RUNNING_SHARE, FAILED_SHARE = 100, 30
"""Every so many-th job runs, has failed."""
VERSION = 5
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Target:
    """One job that clients ask for."""

    id: str
    state: JobState
    created_at: datetime

    @property
    def etag(self) -> str:
        return f'"{self.id}-{VERSION}"'

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL

    @property
    def succeeded(self) -> bool:
        return self.state == JobState.SUCCEEDED


@dataclass(frozen=True)
class Filled:
    """What is in the database."""

    tokens: tuple[str, ...]
    jobs: tuple[Target, ...]
    score_keys: tuple[tuple[str, str, str], ...]
    request: dict[str, Any]


def fill(context: Context, jobs: int, scores: int, clients: int) -> Filled:
    """`jobs` jobs of one tenant that share sets of a thousand scores each, and a key per client."""
    found = inventory(LAYERS)
    sets = [f"{number:064x}" for number in range(max(1, scores // ROWS_PER_SET))]
    tokens, request = _small_things(context, clients, {"inventory": found.as_json()})
    names = sorted(layer.name for layer in found.layers)
    keys_of_set = tuple((layer, scheme, METRIC) for layer in names for scheme in sorted(SCHEMES))
    targets = tuple(
        Target(new_id("job"), _state(number), BEGIN + timedelta(seconds=60 * number))
        for number in range(jobs)
    )
    with context.database.write_connection() as connection:
        _insert(
            connection,
            "score_sets",
            ("digest", "tenant", "settings", "inspection", "created_at"),
            ((digest, TENANT, "{}", None, _time(connection, BEGIN)) for digest in sets),
        )
        _insert(
            connection, "jobs", JOB_COLUMNS, _job_rows(connection, targets, sets, request, found.as_json())
        )
        _insert(
            connection, "events", ("job_id", "seq", "type", "data", "at"), _event_rows(connection, targets)
        )
        _insert(
            connection,
            "scores",
            ("score_set", "layer", "scheme", "metric", "value", "stderr", "samples", "unit_key"),
            _score_rows(sets, keys_of_set),
        )
    if context.database.engine.dialect.name == "postgresql":
        with context.database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
    return Filled(tokens, targets, keys_of_set, request)


def _state(number: int) -> JobState:
    if number % RUNNING_SHARE == 0:
        return JobState.RUNNING
    return JobState.FAILED if number % FAILED_SHARE == 0 else JobState.SUCCEEDED


def _small_things(
    context: Context, clients: int, summary: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Keys, a model, a calibration set, and the request of every job."""
    made = [new_key() for _ in range(clients)]
    with context.database.write() as session:
        for number, key in enumerate(made):
            keys.create(
                session,
                tenant=TENANT,
                name=f"client {number}",
                scope=Scope.SUBMIT,
                prefix=key.prefix,
                digest=key.digest,
            )
        source = {"kind": "upload", "upload": "upload_1", "files": []}
        model = models.create(session, source=source, digest="1" * 64, summary=summary, tenant=TENANT)
        models.set_state(session, model.id, InputState.READY)
        calibration = calibrations.create(
            session,
            source=source,
            digest="2" * 64,
            kind="text",
            state=InputState.READY,
            summary={},
            tenant=TENANT,
        )
    asked = {"model": model.id, "calibration": calibration.id, "budgets": ["4 bpw"]}
    asked |= {"schemes": list(SCHEMES), "metrics": [METRIC], "interactions": False}
    return tuple(key.token for key in made), JobRequest.model_validate(asked).model_dump(mode="json")


JOB_COLUMNS = (
    "id", "tenant", "kind", "state", "stage", "done", "total", "request", "request_digest", "score_set",
    "summary", "epoch", "cancel_requested", "version", "created_at", "started_at", "finished_at", "inventory",
    "lease_owner", "lease_expires_at",
)  # fmt: skip


def _job_rows(
    connection: Connection,
    targets: Sequence[Target],
    sets: Sequence[str],
    request: dict[str, Any],
    found: dict[str, Any],
) -> Iterable[tuple[Any, ...]]:
    asked, told, layers = json.dumps(request), json.dumps({"task": "causal_lm"}), json.dumps(found)
    for number, job in enumerate(targets):
        runs, at = job.state == JobState.RUNNING, _time(connection, job.created_at)
        yield (
            job.id, TENANT, JobKind.SEARCH.value, job.state.value, "scoring", 500 if runs else ROWS_PER_SET,
            ROWS_PER_SET, asked, f"{number:064x}", sets[number % len(sets)],
            told if job.succeeded else None, 1, False, VERSION, at, at,
            None if runs else at, layers if job.succeeded else None,
            "benchmark" if runs else None, 1e11 if runs else None,
        )  # fmt: skip


def _event_rows(connection: Connection, targets: Sequence[Target]) -> Iterable[tuple[Any, ...]]:
    for job in targets:
        for seq, type_ in enumerate(("queued", "running", job.state.value), 1):
            if seq < 3 or job.state != JobState.RUNNING:
                yield (job.id, seq, type_, "{}", _time(connection, job.created_at))


def _score_rows(sets: Sequence[str], score_keys: Sequence[tuple[str, str, str]]) -> Iterable[tuple[Any, ...]]:
    random = np.random.default_rng(0)
    bits = {scheme: float(next(c for c in scheme if c.isdigit())) for scheme in SCHEMES}
    means = np.array([4.0 ** -bits[scheme] for _, scheme, _ in score_keys])
    for digest in sets:
        values = (means * random.uniform(0.5, 1.5, len(means))).tolist()
        for (layer, scheme, metric), value in zip(score_keys, values, strict=True):
            yield (digest, layer, scheme, metric, value, 1e-6, 8, f"score:{layer}:{scheme}")


def _time(connection: Connection, at: datetime) -> Any:
    """As the driver takes it: SQLite keeps naive text."""
    return at if connection.dialect.name == "postgresql" else at.strftime("%Y-%m-%d %H:%M:%S.%f")


def _insert(
    connection: Connection, table: str, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]
) -> None:
    """All rows at once: COPY on PostgreSQL, one prepared statement on SQLite."""
    named, driver = ", ".join(columns), connection.connection.driver_connection
    assert driver is not None, "a connection in use has its driver's"
    if connection.dialect.name == "postgresql":
        with driver.cursor().copy(f"COPY {table} ({named}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        return
    marks = ", ".join("?" for _ in columns)
    driver.executemany(f"INSERT INTO {table} ({named}) VALUES ({marks})", rows)  # noqa: S608 - our own names
