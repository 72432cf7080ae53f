"""`bitplan allocate`: a plan from a table of scores, without a model and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quant.patterns import select
from search.budget import parse_limits
from search.catalog import SOLVERS
from search.compile import Compiled, compile_problem, exact_number
from search.problem import DEFAULT_GAP, Solution, Status
from search.solve import solve
from sensitivity.table_reader import parse_table
from service.cli.exits import exits, leave_with, plan_exit
from service.cli.options import Json, Pins, Ties, assignments, names
from service.cli.output import console, print_json

TableFile = Annotated[
    Path, typer.Argument(metavar="TABLE.json", help='Scores and resources, "bitplan.table/1".')
]
TableLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        help='"bytes<=2 MiB", "latency<=12 ms", "3.5 bpw", "x>=Y", "bytes<=0.25 of range". All hold.',
    ),
]
TableMetric = Annotated[
    str | None, typer.Option("--metric", help="Needed when the table has several metrics.")
]
SolverName = Annotated[str, typer.Option("--solver", help=f"auto, {', '.join(SOLVERS)}.")]
Seconds = Annotated[
    float, typer.Option("--time-limit", help="Seconds; then the best plan known, with its gap.")
]
TargetGap = Annotated[float, typer.Option("--gap", help="Proven relative gap to stop at.")]
DEFAULT_SECONDS = 60.0
Verbose = Annotated[bool, typer.Option("--verbose", help="Tell on standard error what the solver did.")]


def allocate(
    table: TableFile,
    limit: TableLimits = None,
    tie: Ties = None,
    pin: Pins = None,
    metric: TableMetric = None,
    solver: SolverName = "auto",
    time_limit: Seconds = DEFAULT_SECONDS,
    gap: TargetGap = DEFAULT_GAP,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Pick one scheme per layer of a score table under limits. Needs no model."""
    with exits(as_json=as_json, interrupted="nothing is kept: run it again from the beginning"):
        compiled = _compiled(table, limit or (), tie, pin, metric)
        solution = solve(compiled.problem, solver=solver, gap=gap, time_limit=time_limit)
        answer = allocation_json(compiled, solution)
    if verbose:
        _tell(solution)
    if as_json:
        print_json(answer)
    else:
        _show(compiled, solution, answer)
    leave_with(plan_exit([solution.status.value]))


def allocation_json(compiled: Compiled, solution: Solution) -> dict[str, Any]:
    """The answer as `bitplan allocate --json` prints it; the objective is summed anew from the table."""
    assignment = None if solution.choice is None else compiled.assignment(solution.choice)
    return {
        "status": solution.status.value,
        "objective": None if assignment is None else compiled.objective(assignment),
        "bound": solution.bound,
        "gap": solution.gap,
        "choice": assignment,
        "fused": [],
        "resources": {} if assignment is None else _numbers(compiled.resources(assignment)),
        "least_budget": _numbers(solution.least_budget),
        "seconds": solution.seconds,
    }


@dataclass(frozen=True)
class _Names:
    """Layer names as a user gives them: an exact name first, else a pattern."""

    known: tuple[str, ...]

    def expand(self, given: Iterable[str]) -> list[str]:
        found: dict[str, None] = {}
        for name in given:
            is_pattern = name not in self.known and ("*" in name or "?" in name)
            found.update(dict.fromkeys(select([name], self.known) if is_pattern else (name,)))
        return list(found)


def _compiled(
    path: Path, limit: Iterable[str], tie: list[str] | None, pin: list[str] | None, metric: str | None
) -> Compiled:
    table = parse_table(path.read_bytes())
    layers = _Names(table.layer_names)
    pins = {layer: scheme for given, scheme in assignments(pin).items() for layer in layers.expand([given])}
    ties = [layers.expand(members) for members in names(tie)]
    return compile_problem(table, metric=metric, limits=parse_limits(limit), ties=ties, pins=pins)


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    return {name: exact_number(value) for name, value in values.items()}


def _tell(solution: Solution) -> None:
    stream = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in (*solution.log, f"{solution.solver}: {solution.status} in {solution.seconds:.3f} s"):
        stream.print(line, markup=False)


def _show(compiled: Compiled, solution: Solution, answer: Mapping[str, Any]) -> None:
    if solution.choice is None:
        _show_refusal(solution, answer)
        return
    shown = Table(
        "layer", "scheme", title=f"{compiled.metric}: {answer['objective']:.9g} ({solution.status})"
    )
    for layer, scheme in answer["choice"].items():
        shown.add_row(layer, scheme)
    console().print(shown)
    totals = ", ".join(f"{name} {value}" for name, value in answer["resources"].items())
    proof = "" if solution.bound is None else f"bound {solution.bound:.9g}, gap {solution.gap:.2g}"
    console().print(f"{totals}\n{proof}", markup=False)


def _show_refusal(solution: Solution, answer: Mapping[str, Any]) -> None:
    if solution.status is Status.UNKNOWN:
        console().print(
            "No plan was found within the time limit. Give more time with --time-limit.", markup=False
        )
        return
    console().print(f"Infeasible: {solution.reason}.", markup=False)
    for name, value in answer["least_budget"].items():
        console().print(f"  {name}: {value} would fit", markup=False)
