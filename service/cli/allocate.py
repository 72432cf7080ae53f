"""`bitplan allocate`: a plan from a table of scores, without a model and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from search.compile import Compiled, exact_number
from search.conflict import conflict_of
from search.objectives.catalog import DEFAULT, OBJECTIVES, parse_objective, solve_objective
from search.objectives.objective import Objective, Optimum
from search.problem import Solution, Status
from search.question import Question
from search.rate_distortion import rate_distortion
from service.cli.exits import exits, leave_with, plan_exit
from service.cli.options import Json
from service.cli.output import console, print_json, show_conflict, show_reference
from service.cli.spread import spread
from service.cli.table_question import SolverOptions, TableFile
from service.explaining import conflict_json, fused_json, reference_json

ObjectiveText = Annotated[
    str,
    typer.Option(
        "--objective",
        help="What to solve for: " + "; ".join(entry.examples[-1] for entry in OBJECTIVES.values()) + ".",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Tell on standard error what the solver did.")]


@spread
def allocate(
    table: TableFile,
    asked: SolverOptions,
    objective: ObjectiveText = DEFAULT,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Pick one scheme per layer of a score table under limits. Needs no model."""
    with exits(as_json=as_json, interrupted="nothing is kept: run it again from the beginning"):
        wanted = parse_objective(objective)
        question = asked.question(table, wanted)
        compiled = question.compiled()
        found = solve_objective(
            compiled, wanted, solver=asked.solver, gap=asked.gap, time_limit=asked.time_limit, prices=True
        )
        solution = found.solution
        answer = allocation_json(question, wanted, found)
    if verbose:
        _tell(solution)
    if as_json:
        print_json(answer)
    else:
        _show(compiled, wanted, solution, answer)
    leave_with(plan_exit([solution.status.value]))


def allocation_json(question: Question, wanted: Objective, found: Optimum) -> dict[str, Any]:
    """The answer as `bitplan allocate --json` prints it; a metric's sum is summed anew from the table."""
    compiled, solution = question.compiled(), found.solution
    infeasible = solution.status is Status.INFEASIBLE
    conflict = conflict_of(question, solution.least_budget) if infeasible else None
    assignment = None if solution.choice is None else compiled.assignment(solution.choice)
    fused = () if solution.choice is None else compiled.fused(solution.choice)
    return {
        "status": solution.status.value,
        "solved_for": wanted.text,
        "objective": _value(compiled, wanted, solution),
        "bound": solution.bound,
        "gap": solution.gap,
        "parts": [part.as_json() for part in found.parts],
        "choice": assignment,
        "fused": fused_json(compiled, fused),
        "resources": {} if assignment is None else _numbers(compiled.resources(assignment, fused)),
        "reference": None if fused else _reference(compiled, assignment),
        "shadow_prices": dict(solution.prices),
        "least_budget": _numbers(solution.least_budget),
        "conflict": conflict_json(conflict),
        "seconds": solution.seconds,
        "method": solution.method,
        "why": solution.why,
    }


def _value(compiled: Compiled, wanted: Objective, solution: Solution) -> float | None:
    if solution.choice is None or wanted.text != DEFAULT:
        return solution.objective
    return compiled.objective(compiled.assignment(solution.choice), compiled.fused(solution.choice))


def _reference(compiled: Compiled, assignment: Mapping[str, str] | None) -> dict[str, Any] | None:
    if assignment is None:
        return None
    return reference_json(rate_distortion(compiled.table, compiled.metric, assignment))


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    return {name: exact_number(value) for name, value in values.items()}


def _tell(solution: Solution) -> None:
    stream = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in (*solution.log, _outcome_line(solution)):
        stream.print(line, markup=False)


def _outcome_line(solution: Solution) -> str:
    how = f" by {solution.method}: {solution.why}" if solution.method else ""
    return f"{solution.solver}: {solution.status} in {solution.seconds:.3f} s{how}"


def _show(compiled: Compiled, wanted: Objective, solution: Solution, answer: Mapping[str, Any]) -> None:
    if solution.choice is None:
        _show_refusal(solution, answer)
        return
    named = compiled.metric if wanted.text == DEFAULT else wanted.text
    shown = Table("layer", "scheme", title=f"{named}: {answer['objective']:.9g} ({solution.status})")
    for layer, scheme in answer["choice"].items():
        shown.add_row(layer, scheme)
    console().print(shown)
    for one in answer["fused"]:
        console().print(f"fused: {' + '.join(one['layers'])} at {one['scheme']}", markup=False)
    totals = ", ".join(f"{name} {value}" for name, value in answer["resources"].items())
    proof = "" if solution.bound is None else f"bound {solution.bound:.9g}, gap {solution.gap:.2g}"
    console().print(f"{totals}\n{proof}", markup=False)
    for part in answer["parts"]:
        console().print(f"{part['name']}: {part['value']:.9g}", markup=False)
    for name, price in solution.prices.items():
        console().print(f"price of {name}: {price:.4g} per unit", markup=False)
    show_reference(answer["reference"])


def _show_refusal(solution: Solution, answer: Mapping[str, Any]) -> None:
    if solution.status is Status.UNKNOWN:
        late = "No plan was found within the time limit. Give more time with --time-limit."
        console().print(f"No plan: {solution.reason}." if solution.reason else late, markup=False)
        return
    console().print(f"Infeasible: {solution.reason}.", markup=False)
    for name, value in answer["least_budget"].items():
        console().print(f"  {name}: {value} would fit", markup=False)
    show_conflict(answer["conflict"])
