"""Rows to records, and the two statements every repository shares: a page, and an insert that yields to the
first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, bindparam, literal_column, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.sql.elements import KeyedColumnElement

from service.db.tables import AuditRow, Base, CalibrationRow, JobRow, ModelRow, PlanRow
from service.records import Cursor

Record = TypeVar("Record")
Item = TypeVar("Item")
Pageable = TypeVar("Pageable", JobRow, ModelRow, CalibrationRow, PlanRow, AuditRow)
MAXIMUM_PAGE = 200


def record_of(record: type[Record], row: Base, /, **enums: type[StrEnum]) -> Record:
    """The frozen record with the row's columns; `enums` names the columns that become an enumeration."""
    values = {name: getattr(row, name) for name in names_of(record)}  # type: ignore[arg-type]
    for name, enum in enums.items():
        values[name] = None if values[name] is None else enum(values[name])
    return record(**values)


@cache
def names_of(record: type) -> tuple[str, ...]:
    """The fields of a record, in order."""
    return tuple(field.name for field in fields(record))


@cache
def columns_of(record: type, table: type[Base]) -> tuple[KeyedColumnElement[Any], ...]:
    """The columns that are a record's fields, in its order: ``record(*row)`` needs no mapped object."""
    return tuple(table.__table__.columns[name] for name in names_of(record))


def page(
    session: Session,
    table: type[Pageable],
    tenant: str,
    limit: int,
    after: Cursor | None,
    *conditions: ColumnElement[bool],
) -> list[Pageable]:
    """At most `limit` rows of a tenant, the newest first, behind `after`."""
    statement = page_statement(select(table), table, after is not None, *conditions)
    return list(session.scalars(statement, page_parameters(tenant, limit, after)))


def page_statement(
    query: Select[Any], table: type[Pageable], later: bool, *conditions: ColumnElement[bool]
) -> Select[Any]:
    """What `page` asks, of the columns that `query` selects; `later` for pages behind a cursor. Its values
    are `page_parameters`: a statement that is made once costs its page a millisecond less.
    """
    query = query.where(table.tenant == bindparam("tenant"), *conditions)
    if later:
        last = tuple_(
            bindparam("after_at", type_=table.created_at.type), bindparam("after_id", type_=table.id.type)
        )
        query = query.where(tuple_(table.created_at, table.id) < last)
    return query.order_by(table.created_at.desc(), table.id.desc()).limit(bindparam("page_size"))


def page_parameters(tenant: str, limit: int, after: Cursor | None) -> dict[str, Any]:
    """The values of a `page_statement`. Raises ValueError for a page that is too large."""
    if not 1 <= limit <= MAXIMUM_PAGE:
        raise ValueError(f"limit must be between 1 and {MAXIMUM_PAGE}. Got {limit}.")
    found: dict[str, Any] = {"tenant": tenant, "page_size": limit}
    return found if after is None else {**found, "after_at": after.created_at, "after_id": after.id}


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of at most `size`, for statements with a parameter or more per item.

    >>> list(chunks("abc", 2))
    [['a', 'b'], ['c']]
    """
    every = list(items)
    return (every[start : start + size] for start in range(0, len(every), size))


def insert_or_keep(session: Session, table: type[Base], values: Mapping[str, Any]) -> bool:
    """Insert a row, or keep the one that already has its key. True if the row is new."""
    dialect = session.get_bind().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement: ReturningInsert[tuple[Any]] = (
        insert(table).values(**values).on_conflict_do_nothing().returning(literal_column("1"))
    )
    return session.execute(statement).first() is not None
