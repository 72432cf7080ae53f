from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from service.db.engine import Database
from service.db.repositories import events, uploads
from service.passing import passing
from service.runner import context as module
from service.runner.context import JobContext

NewContext = Callable[[], JobContext]
POSTGRES = pytest.mark.parametrize(
    "empty_database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


def test_a_write_commits_or_does_nothing(new_context: NewContext, database: Database) -> None:
    context = new_context()

    def change(session: Session) -> None:
        uploads.record_blob(session, "aa", 1)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        context.write(change)
    assert context.read(lambda session: uploads.get_blob(session, "aa")) is None
    assert context.write(lambda session: uploads.record_blob(session, "aa", 1))
    assert context.read(lambda session: uploads.get_blob(session, "aa")) is not None


def test_a_busy_database_is_tried_again(new_context: NewContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    context = new_context()
    tries: list[int] = []

    def change(session: Session) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OperationalError("insert", {}, Exception("database is locked"))
        return "done"

    assert context.write(change) == "done"
    assert len(tries) == 3


def test_patience_ends(new_context: NewContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    tries: list[int] = []

    def change(session: Session) -> None:
        tries.append(1)
        raise OperationalError("insert", {}, Exception("database is locked"))

    with pytest.raises(OperationalError):
        new_context().write(change)
    assert len(tries) == module.WRITE_TRIES


def test_what_is_impossible_is_not_tried_again(new_context: NewContext) -> None:
    context = new_context()
    tries: list[int] = []

    def change(session: Session) -> None:
        tries.append(1)
        for _ in range(2):
            events.append(session, context.job.id, "failed")

    with pytest.raises(IntegrityError):
        context.write(change)
    assert len(tries) == 1


@POSTGRES
def test_a_connection_that_breaks_in_the_middle_is_replaced(
    new_context: NewContext, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context()
    tries: list[int] = []

    def change(session: Session) -> str:
        tries.append(1)
        context_event = events.append(session, context.job.id, "note", {"try": len(tries)})
        if len(tries) == 1:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return context_event.type

    assert context.write(change) == "note"
    with database.read() as session:
        notes = [event.data for event in events.list_after(session, context.job.id) if event.type == "note"]
    assert notes == [{"try": 2}]


def test_a_database_that_cannot_be_reached_is_waited_for() -> None:
    nowhere = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(DBAPIError) as caught, nowhere.read() as session:
        session.execute(text("SELECT 1"))
    nowhere.close()
    assert passing(caught.value)


def test_a_table_that_is_missing_is_not_waited_for(database: Database) -> None:
    with pytest.raises(DBAPIError) as caught, database.read() as session:
        session.execute(text("SELECT * FROM nowhere"))
    assert not passing(caught.value)
