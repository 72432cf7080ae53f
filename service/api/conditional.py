"""ETag, If-None-Match and Prefer: answering "nothing new" without a body, or waiting until there is
something."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Header, Response

LONGEST_WAIT = 30
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,4})(?:$|[,;\s])")

IfNoneMatch = Annotated[
    str | None, Header(alias="If-None-Match", description="An ETag that you have; 304 when it still holds.")
]
Prefer = Annotated[
    str | None,
    Header(alias="Prefer", description="wait=N: answer on a change, or after N (at most 30) seconds."),
]


def matches(etag: str, if_none_match: str | None) -> bool:
    """Whether the client has this version.

    >>> matches('"a-1"', 'W/"a-1", "b"'), matches('"a-1"', None)
    (True, False)
    """
    if if_none_match is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or "*" in tags


def wait_seconds(prefer: str | None) -> int:
    """The seconds that a client is willing to wait.

    >>> wait_seconds("respond-async, wait=10"), wait_seconds("wait=999"), wait_seconds(None)
    (10, 30, 0)
    """
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), LONGEST_WAIT) if found else 0


def not_modified(etag: str, headers: dict[str, str] | None = None) -> Response:
    """The answer 304."""
    return Response(status_code=304, headers={"ETag": etag, **(headers or {})})
