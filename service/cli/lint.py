"""`bitplan lint`: what a runtime cannot run of a plan, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from quant.lint import lint as violations_of
from quant.runtimes import RUNTIMES
from service.cli import options
from service.cli.exits import Exit, exits, leave_with
from service.cli.output import console, print_json
from service.cli.plan_files import read_plan


def lint(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file.")],
    runtime: options.Runtime = None,
    as_json: options.Json = False,
) -> None:
    """Say which layers of a plan a runtime cannot run, and by which rule; exit status 2 when there are any.

    Without --runtime the plan's own runtime is meant.
    """
    with exits(as_json=as_json):
        document = read_plan(plan)
        name = _known(runtime or document.runtime)
        violations = violations_of(document, RUNTIMES[name])
    if as_json:
        print_json({"runtime": name, "violations": [violation.as_json() for violation in violations]})
    elif violations:
        table = Table("layer", "rule", title=f"{len(violations)} violations of {name}", title_justify="left")
        for violation in violations:
            table.add_row(violation.layer, violation.rule)
        console().print(table)
    else:
        console().print(f"{name} runs all {len(document.layers)} layers", markup=False)
    if violations:
        leave_with(Exit.BAD_INPUT)


def _known(name: str | None) -> str:
    if name not in RUNTIMES:
        raise ValueError(f"A runtime must be one of {', '.join(RUNTIMES)}. Got {name!r}. Add --runtime vllm.")
    return name
