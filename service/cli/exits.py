"""Exit codes of every command, and the one place where exceptions become them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer
from rich.console import Console


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

    ValueError and OSError are what users' input causes (status 2); a `CommandError` brings its own status.
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
    except (ValueError, OSError) as error:
        _leave(str(error) or type(error).__name__, Exit.BAD_INPUT, as_json=as_json)


def _leave(message: str, code: Exit, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit": int(code)}) + "\n")
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"bitplan: {message}", markup=False)
    raise typer.Exit(int(code))
