"""Pages of lists, the newest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from service.api.cursors import Cursors
from service.api.resources import Item, Page
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
    """The page of `rows`; a full page may have a successor."""
    more = cursors.make(kind, [rows[-1].created_at.isoformat(), rows[-1].id]) if len(rows) == limit else None
    return Page(items=[present(row) for row in rows], next_cursor=more)
