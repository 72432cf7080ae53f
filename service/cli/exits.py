"""Exit codes of every command, and the one place where exceptions become them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer
from pydantic import ValidationError
from rich.console import Console

from service.errors import ServiceError
from service.remote.transport import ClientError, JobFailed, ProblemError


class Exit(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    INFEASIBLE = 3
    NO_PLAN_IN_TIME = 4
    INTERRUPTED = 130


class CommandError(Exception):
    """A message for the user and the exit status that goes with it."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


def plan_exit(statuses: list[str]) -> Exit:
    """The exit status for plans with these statuses: the worst of them decides.

    >>> plan_exit(["optimal", "infeasible"]).name
    'INFEASIBLE'
    """
    if "infeasible" in statuses:
        return Exit.INFEASIBLE
    return Exit.NO_PLAN_IN_TIME if "unknown" in statuses else Exit.DONE


@contextmanager
def exits(*, as_json: bool = False) -> Iterator[None]:
    """Turn exceptions into a message on standard error and an exit status.

    ValueError, OSError and problems of the 400s are what users' input causes (status 2); a `CommandError`
    brings its own status; a server that cannot be reached and problems of the 500s are failures (status 1).
    """
    try:
        yield
    except CommandError as error:
        _leave(str(error), error.code, as_json=as_json)
    except KeyboardInterrupt:
        _leave(
            "interrupted: run the same command again to go on where it stopped",
            Exit.INTERRUPTED,
            as_json=as_json,
        )
    except ServiceError as error:
        _leave(error.detail, _blame(error.status), as_json=as_json)
    except ProblemError as error:
        _leave(str(error), _blame(error.status), as_json=as_json)
    except JobFailed as error:
        problem = error.resource.get("problem") or {}
        _leave(str(error), _blame(int(problem.get("status", 500))), as_json=as_json)
    except ClientError as error:
        _leave(str(error), Exit.FAILED, as_json=as_json)
    except ValidationError as error:
        _leave(validation_message(error), Exit.BAD_INPUT, as_json=as_json)
    except (ValueError, OSError) as error:
        _leave(str(error) or type(error).__name__, Exit.BAD_INPUT, as_json=as_json)


def validation_message(error: ValidationError) -> str:
    """Every fault of a request on a line of its own, with the member it is in."""
    return "\n".join(
        ".".join(map(str, fault["loc"])) + ": " + fault["msg"] for fault in error.errors(include_url=False)
    )


def _blame(status: int) -> Exit:
    return Exit.BAD_INPUT if 400 <= status < 500 else Exit.FAILED


def _leave(message: str, code: Exit, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit": int(code)}) + "\n")
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"bitplan: {message}", markup=False)
    raise typer.Exit(int(code))
