"""Where plans are written and read: one file for one budget, a folder for several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensitivity.contexts import context_of

if TYPE_CHECKING:
    from quant.plan import Plan


def check_output(output: Path | None, *, several: bool) -> None:
    """Raise ValueError when `output` cannot be written later: said before anything is measured."""
    if output is None:
        return
    if several and output.exists() and not output.is_dir():
        raise ValueError(
            f"--output must be a folder when there are several plans. Got the file {str(output)!r}. "
            "Name another one."
        )
    if not several and output.is_dir():
        raise ValueError(
            f"--output must be a file when there is one plan. Got the folder {str(output)!r}. "
            f"Write for example {str(output / 'plan.json')!r}."
        )
    folder = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    if not folder.is_dir() and folder != output:
        raise ValueError(
            f"--output must be inside a folder. Got {str(output)!r}, but {str(folder)!r} is a file."
        )


def title_of(plan: Mapping[str, Any]) -> str:
    """What tells one plan of a job from another: its budget, and its context where each has its plan.

    >>> title_of({"budget": "4 bpw", "metric": "sqnr@code"}), title_of({"budget": "4 bpw", "metric": "sqnr"})
    ('4 bpw code', '4 bpw')
    """
    context = context_of(plan.get("metric") or "")
    return f"{plan['budget']} {context}" if context else str(plan["budget"])


def file_of(output: Path, title: str, *, several: bool) -> Path:
    """Where the plan of that title goes: `output` itself, or a file of that folder when there are several.

    >>> file_of(Path("plans"), "bytes<=2 MiB", several=True).as_posix()
    'plans/bytes-at-most-2-MiB.plan.json'
    """
    if not several:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    output.mkdir(parents=True, exist_ok=True)
    words = title.replace("<=", " at most ").replace(">=", " at least ")
    return output / (re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-") + ".plan.json")


def read_plan(path: Path) -> Plan:
    """The plan of a file. Raises OSError or PlanError."""
    from quant.plan import parse_plan

    return parse_plan(path.read_bytes())
