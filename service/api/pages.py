"""Pages of lists, the newest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from fastapi import Response
from pydantic_core import to_json

from service.api.cursors import Cursors
from service.api.resources import Item, Json, Page
from service.records import Cursor


class _Row(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def created_at(self) -> datetime: ...


Row = TypeVar("Row", bound=_Row)


def position(cursors: Cursors, kind: str, cursor: str | None) -> Cursor | None:
    """Where a page starts: behind this row, or at the beginning."""
    if cursor is None:
        return None
    created_at, ident = cursors.read(kind, cursor)
    return Cursor(datetime.fromisoformat(created_at), ident)


def page_of(
    cursors: Cursors, kind: str, rows: Sequence[Row], limit: int, present: Callable[[Row], Item]
) -> Page[Item]:
    """The page of `rows`."""
    return Page(items=[present(row) for row in rows], next_cursor=next_cursor(cursors, kind, rows, limit))


def next_cursor(cursors: Cursors, kind: str, rows: Sequence[_Row], limit: int) -> str | None:
    """The cursor behind `rows`; a full page may have a successor."""
    return cursors.make(kind, [rows[-1].created_at.isoformat(), rows[-1].id]) if len(rows) == limit else None


def page_response(items: Sequence[Json], more: str | None) -> Response:
    """A `Page` of items that are written as they are: FastAPI would check each of them again, in a thread of
    the pool.
    """
    content = to_json({"items": items, "next_cursor": more}, inf_nan_mode="null")
    return Response(content, media_type="application/json")
