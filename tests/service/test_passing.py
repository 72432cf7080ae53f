"""What is waited for, and what a request is answered meanwhile."""

import errno
import sqlite3

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from service.passing import SQLITE_SAYS, disk_problem, passing


class RefusedError(Exception):
    """An error of PostgreSQL, as psycopg has it."""

    def __init__(self, sqlstate: str):
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


@pytest.mark.parametrize("words", SQLITE_SAYS)
def test_what_sqlite_says_of_locks_and_disks_passes(words):
    assert passing(OperationalError("INSERT", {}, sqlite3.OperationalError(words)))


def test_what_sqlite_says_of_statements_does_not():
    assert not passing(OperationalError("INSERT", {}, sqlite3.OperationalError("no such table: nowhere")))
    assert not passing(IntegrityError("INSERT", {}, sqlite3.IntegrityError("UNIQUE constraint failed")))


@pytest.mark.parametrize(
    "state", ["08006", "25006", "40001", "40P01", "53100", "53300", "57P01", "57P03", "58030"]
)
def test_states_of_postgresql_that_pass(state):
    assert passing(DBAPIError("INSERT", {}, RefusedError(state)))


@pytest.mark.parametrize("state", ["23505", "25001", "42P01", "58P01", "57014"])
def test_states_of_postgresql_that_stay(state):
    assert not passing(DBAPIError("INSERT", {}, RefusedError(state)))


@pytest.mark.parametrize(
    ("number", "status", "slug"),
    [
        (errno.ENOSPC, 507, "disk-full"),
        (errno.EDQUOT, 507, "disk-full"),
        (errno.EROFS, 503, "disk-read-only"),
    ],
)
def test_a_disk_that_takes_nothing_passes_and_is_told(number, status, slug):
    error = OSError(number, "no")
    problem = disk_problem(error)
    assert passing(error)
    assert problem is not None
    assert (problem.status, problem.slug) == (status, slug)
    assert ("Retry-After" in problem.headers) == (status == 503)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no"), PermissionError("no"), ValueError("no")])
def test_other_errors_are_not_waited_for(error):
    assert not passing(error)
    assert not isinstance(error, OSError) or disk_problem(error) is None
