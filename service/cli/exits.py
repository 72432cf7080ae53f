"""Exit codes of every command, and the one place where exceptions become them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import ValidationError


class Exit(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    INFEASIBLE = 3
    NO_PLAN_IN_TIME = 4
    INTERRUPTED = 130


Told = tuple[str, Exit]
UNREADABLE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
NOT_UTF8 = "A file must be UTF-8 text. Got {}. Save it as UTF-8."


class CommandError(Exception):
    """A message for the user and the exit status that goes with it."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


def plan_exit(statuses: Sequence[str]) -> Exit:
    """The exit status for plans with these statuses: the worst of them decides.

    >>> plan_exit(["optimal", "infeasible"]).name
    'INFEASIBLE'
    """
    if "infeasible" in statuses:
        return Exit.INFEASIBLE
    return Exit.NO_PLAN_IN_TIME if "unknown" in statuses else Exit.DONE


def leave_with(code: Exit) -> None:
    """End the command with this status, unless it is done."""
    if code is not Exit.DONE:
        raise typer.Exit(int(code))


@contextmanager
def exits(*, as_json: bool = False, interrupted: str = "nothing was changed") -> Iterator[None]:
    """Turn exceptions into a message on standard error and an exit status; with `as_json`, into a JSON
    document on standard output too.

    ValueError, missing files and problems of the 400s are what users' input causes (status 2); a
    `CommandError` brings its own status; a server that cannot be reached, a database that cannot be used and
    problems of the 500s are failures (status 1). `interrupted` says how things stand after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        refuse(f"interrupted: {interrupted}", Exit.INTERRUPTED, as_json=as_json)
    except typer.Exit:
        raise
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        refuse(*told, as_json=as_json)


def explain(error: Exception) -> Told | None:
    """The message and the exit status of an exception; None for one that nobody expects."""
    from pydantic import ValidationError

    from service.errors import ServiceError
    from service.remote.transport import ClientError, JobFailed, ProblemError

    expected: Sequence[tuple[Any, Callable[[Any], Told]]] = (
        (CommandError, lambda known: (str(known), known.code)),
        (ServiceError, lambda problem: (problem.detail, _blame(problem.status))),
        (ProblemError, lambda problem: (str(problem), _blame(problem.status))),
        (
            JobFailed,
            lambda failed: (
                str(failed),
                _blame(int((failed.resource.get("problem") or {}).get("status", 500))),
            ),
        ),
        (ClientError, lambda failure: (str(failure), Exit.FAILED)),
        (ValidationError, lambda faults: (validation_message(faults), Exit.BAD_INPUT)),
        (UnicodeDecodeError, lambda fault: (NOT_UTF8.format(fault.reason), Exit.BAD_INPUT)),
        (ValueError, lambda misuse: (str(misuse) or type(misuse).__name__, Exit.BAD_INPUT)),
        (UNREADABLE, lambda fault: (_unreadable(fault), Exit.BAD_INPUT)),
        (OSError, lambda fault: (str(fault), Exit.FAILED)),
    )
    for kinds, tell in expected:
        if isinstance(error, kinds):
            return tell(error)
    if type(error).__module__.partition(".")[0] in ("service", "sqlalchemy"):
        return str(getattr(error, "orig", error)), Exit.FAILED
    return None


OPTIONS = {
    "latency_ns": "latency-table",
    "time_limit_seconds": "time-limit",
    "time_budget_seconds": "time-budget",
    "interactions": "no-interactions",
    "deployment": "context-length",
    "deployment/batch": "serving-batch",
    "deployment/kv_cache": "kv-cache-type",
    "contexts/edges": "timestep-edge",
    "contexts/weights": "context-weight",
}
"""Members of a request, those of nested ones too, whose option has another name."""
REPEATED = frozenset(
    {
        "budgets",
        "corrections",
        "limits",
        "metrics",
        "pins",
        "ratios",
        "role_limits",
        "role_metrics",
        "roles",
        "targets",
        "ties",
    }
)


def option_of(*place: str | int) -> str:
    """The option that a member of a request comes from.

    >>> option_of("role_limits", "*.conv_in"), option_of("deployment", "batch")
    ('--role-limit', '--serving-batch')
    """
    member = str(place[0])
    nested = "/".join(str(part) for part in place[:2])
    own = member.removesuffix("s") if member in REPEATED else member
    return "--" + OPTIONS.get(nested, OPTIONS.get(member, own)).replace("_", "-")


def validation_message(error: ValidationError) -> str:
    """Every fault of a request on a line of its own, with the option or variable that it is in."""
    return "\n".join(_fault(fault, error.title) for fault in error.errors(include_url=False))


def _fault(fault: Any, title: str) -> str:
    if not fault["loc"]:
        return str(fault["msg"])
    member = str(fault["loc"][0])
    if title == "Settings":
        return f"BITPLAN_{member.upper()}: {fault['msg']}. Got {fault['input']!r}."
    own_words = "-" in fault["type"]
    words = fault["msg"] if own_words else f"{fault['msg']}. Got {fault['input']!r}."
    return f"{option_of(*fault['loc'])}: {words}"


def _unreadable(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    return f"A file must exist and be readable. Got {error.filename!r}: {error.strerror}. Check the path."


def _blame(status: int) -> Exit:
    return Exit.BAD_INPUT if 400 <= status < 500 else Exit.FAILED


def refuse(message: str, code: Exit, *, as_json: bool) -> None:
    """Tell why on standard error, with `as_json` on standard output too, and end the command."""
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit": int(code)}, ensure_ascii=False) + "\n")
    sys.stderr.write(f"bitplan: {message}\n")
    raise typer.Exit(int(code))
