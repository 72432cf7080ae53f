"""Named places where a test may kill, stop or slow a process, to prove that a restart loses nothing.

BITPLAN_FAILPOINTS is a comma-separated list of ``name=action`` or ``name:nth=action``; the nth pass of this
process through the place takes the action: ``kill`` (SIGKILL to itself), ``stop`` (SIGSTOP to itself, until
somebody sends SIGCONT), ``exit`` (at once, status 70), ``raise`` (`FailpointReached`) or ``sleep:SECONDS``.
With BITPLAN_FAILPOINTS_ONCE=FOLDER each entry fires once over all processes that share the folder, so that
the process that takes over gets through.
"""

# ruff: noqa: N818 - an error is named after what went wrong

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

VARIABLE = "BITPLAN_FAILPOINTS"
ONCE_VARIABLE = "BITPLAN_FAILPOINTS_ONCE"
EXIT_STATUS = 70

FAILPOINTS: Mapping[str, str] = {
    "api.blob_written": "a blob is complete in the store, its row is not committed",
    "api.before_commit": "the rows of a POST are written, not committed",
    "api.after_commit": "the rows of a POST are committed, the answer is not sent",
    "runner.after_claim": "a job is claimed, its handler has not begun",
    "runner.hub_announced": "the files of a hub model are listed and its small ones stored, no row says so",
    "runner.hub_fetching": "a piece of a large file of a hub model has been written",
    "runner.hub_arrived": "every file of a hub model is in the store, no row says so",
    "runner.before_store": "a unit's result has come back, nothing is written",
    "runner.artifact_written": "a unit's arrays are in the store, its rows are not committed",
    "runner.after_store": "a unit's rows are committed",
    "runner.scoring": "a score or a block of samples or probes is committed",
    "runner.choosing": "the measurement of a plan on the choosing part is committed",
    "runner.reporting": "the measurement of a plan on the reporting part is committed",
    "runner.writing_plan": "a plan is decided, its row is not committed",
    "runner.checkpoint_stored": "a checkpoint is in the store, its job does not say so yet",
    "runner.before_finish": "every result of a job is stored, its final state is not",
    "webhook.before_send": "a delivery is claimed, nothing is sent",
    "webhook.after_send": "a delivery was answered, its row does not say so yet",
    "worker.before_unit": "a worker has received a unit",
    "worker.after_unit": "a worker has a result that it has not sent",
}

_ENTRY = re.compile(r"([a-z_.]+)(?::([1-9][0-9]*))?=(kill|stop|exit|raise|sleep:[0-9.]+)")
_passes: Counter[str] = Counter()


class FailpointError(ValueError):
    """BITPLAN_FAILPOINTS cannot be read, or the code names a failpoint that is not in the catalog."""


class FailpointReached(RuntimeError):
    """The action ``raise`` of a failpoint."""


@dataclass(frozen=True)
class Action:
    """What to do at the nth pass through one failpoint."""

    name: str
    nth: int
    verb: str


@lru_cache(maxsize=16)
def parse_failpoints(text: str) -> tuple[Action, ...]:
    """The actions that a value of BITPLAN_FAILPOINTS asks for.

    >>> parse_failpoints("worker.before_unit:3=kill")
    (Action(name='worker.before_unit', nth=3, verb='kill'),)
    """
    actions = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise FailpointError(
                f"A failpoint must be name[:nth]=kill|stop|exit|raise|sleep:SECONDS. Got {entry!r}."
            )
        _check_name(match[1])
        actions.append(Action(match[1], int(match[2] or 1), match[3]))
    return tuple(actions)


def _check_name(name: str) -> None:
    if name not in FAILPOINTS:
        raise FailpointError(f"A failpoint must be one of {', '.join(FAILPOINTS)}. Got {name!r}.")


def failpoint(name: str) -> None:
    """Pass through the place `name`: nothing happens unless BITPLAN_FAILPOINTS names it."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    _check_name(name)
    _passes[name] += 1
    for action in parse_failpoints(text):
        if action.name == name and action.nth == _passes[name] and _first_time(action):
            _act(action)


def _first_time(action: Action) -> bool:
    folder = os.environ.get(ONCE_VARIABLE)
    if not folder:
        return True
    marker = Path(folder) / f"{action.name}.{action.nth}.{action.verb.replace(':', '_')}"
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _act(action: Action) -> None:
    if action.verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.verb == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action.verb == "exit":
        os._exit(EXIT_STATUS)
    elif action.verb == "raise":
        raise FailpointReached(f"Failpoint {action.name} was reached for the {action.nth}. time.")
    else:
        time.sleep(float(action.verb.partition(":")[2]))
