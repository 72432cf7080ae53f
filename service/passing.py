"""What goes wrong around a process and passes: a database that is busy or away, a disk that is full or
read-only.

Who meets it waits and tries again; nobody's job fails of it.
"""

from __future__ import annotations

import errno

from sqlalchemy.exc import DBAPIError, OperationalError

from service.errors import InsufficientStorage, ServiceError, Unavailable

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY = frozenset({errno.EROFS})
RETRY_SECONDS = "5"
SQLITE_SAYS = (
    "database is locked",
    "database is busy",
    "database or disk is full",
    "attempt to write a readonly database",
    "unable to open database file",
    "disk I/O error",
)
SQLSTATES = ("08", "25006", "40", "53", "57P", "58030")
"""Classes and codes of PostgreSQL: connection, read-only (a standby), serialization, resources (a full disk,
too many connections), shutdown and start, input or output.
"""


def passing(error: BaseException) -> bool:
    """Whether the database or the disk is busy, restarting, full or away, rather than asked for something
    impossible.
    """
    if isinstance(error, DBAPIError):
        state = str(getattr(error.orig, "sqlstate", None) or "")
        said = any(words in str(error.orig) for words in SQLITE_SAYS)
        return (
            error.connection_invalidated or said or _unreachable(error, state) or state.startswith(SQLSTATES)
        )
    return isinstance(error, OSError) and error.errno in FULL | READ_ONLY


def _unreachable(error: DBAPIError, state: str) -> bool:
    """A connection that cannot be made at all has no SQLSTATE, only its class."""
    return (
        not state
        and type(error.orig).__module__.startswith("psycopg")
        and isinstance(error, OperationalError)
    )


def disk_problem(error: OSError) -> ServiceError | None:
    """The answer to a request that met a full disk (507) or a read-only one (503); None for other errors."""
    if error.errno in FULL:
        return InsufficientStorage(
            "disk-full",
            "The server must have room for the request. Got a full disk. Try again, or resume, later.",
        )
    if error.errno in READ_ONLY:
        detail = "The server's disk must take writes. Got a read-only one. Try again later."
        return Unavailable("disk-read-only", detail, headers={"Retry-After": RETRY_SECONDS})
    return None
