"""Every list and look-up walks an index: no table is read through, nothing is sorted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.repositories import audit, calibrations, events, jobs, models, plans, scores, tenants
from service.records import Cursor
from service.states import JobKind, JobState

AFTER = Cursor(datetime(2026, 11, 1, tzinfo=UTC), "id_1")
KEY = ("a", "w4", "sqnr")
ALIVE = frozenset({JobState.QUEUED, JobState.SUCCEEDED})
SEARCH, MEASURE = JobKind.SEARCH, JobKind.MEASURE_PLAN
QUESTIONS: dict[str, Callable[[Session], Any]] = {
    "jobs": lambda session: jobs.list_page(session, kind=SEARCH),
    "jobs, a later page": lambda session: jobs.list_page(session, kind=SEARCH, after=AFTER),
    "jobs in a state": lambda session: jobs.list_page(session, kind=SEARCH, state=JobState.FAILED),
    "jobs in a state, a later page": lambda session: jobs.list_page(
        session, kind=MEASURE, state=JobState.FAILED, after=AFTER
    ),
    "all jobs of a kind": lambda session: jobs.list_kind(session, MEASURE),
    "the job of a request": lambda session: jobs.find_by_request(session, "d", ALIVE),
    "versions": lambda session: jobs.versions(session, ["job_1", "job_2"]),
    "standings": lambda session: jobs.standings(session, ["job_1", "job_2"]),
    "jobs that count": lambda session: tenants.unfinished_jobs(session, "default"),
    "models": lambda session: models.list_page(session, after=AFTER),
    "calibrations": lambda session: calibrations.list_page(session, after=AFTER),
    "plans": lambda session: plans.list_page(session, "job_1", after=AFTER),
    "the plan of a budget": lambda session: plans.find(session, "job_1", "4 bpw", "d"),
    "events": lambda session: events.list_after(session, "job_1", 3),
    "scores": lambda session: scores.list_page(session, "s", metrics=["sqnr"], schemes=["w2", "w4"]),
    "scores, a later page": lambda session: scores.list_page(
        session, "s", after=KEY, metrics=["sqnr"], schemes=["w2", "w4"]
    ),
    "audit": lambda session: audit.list_page(session, tenant="default", limit=50, after=AFTER),
}
MAY_SORT = {"the job of a request"}
"""The few rows of one request."""


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_walks_an_index(database: Database, name: str) -> None:
    lines = [line for plan in plans_of(database, QUESTIONS[name]) for line in plan]
    assert lines
    bad = [line for line in lines if line.startswith("SCAN ") or "Seq Scan" in line]
    sorts = [line for line in lines if "TEMP B-TREE" in line or "Sort" in line]
    assert not bad, lines
    assert not sorts or name in MAY_SORT, lines


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name.endswith("a later page")])
def test_a_later_page_begins_where_the_one_before_has_ended(database: Database, name: str) -> None:
    """The cursor bounds the index: what is before it is not read and thrown away."""
    lines = [line for plan in plans_of(database, QUESTIONS[name]) for line in plan]
    assert any(
        ("SEARCH" in line or "Index Cond" in line) and ("<" in line or ">" in line) for line in lines
    ), lines


def plans_of(database: Database, ask: Callable[[Session], Any]) -> list[list[str]]:
    """How the database would answer each statement of the question."""
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "WITH")):
            asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    with database.read() as session:
        ask(session)
    event.remove(database.engine, "before_cursor_execute", note)
    with database.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            explain = "EXPLAIN QUERY PLAN "
        else:
            explain = "EXPLAIN "
            for kind in ("seqscan", "bitmapscan"):
                connection.execute(text(f"SET enable_{kind} = off"))
        return [
            [str(row[-1]).strip() for row in connection.exec_driver_sql(explain + statement, parameters)]
            for statement, parameters in asked
        ]
