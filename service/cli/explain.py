"""`bitplan explain`: why a plan is as it is, or why nothing fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from search.explain import DRAWS
from search.explain import explain as explanation_of
from search.objectives.additive import Sum
from search.objectives.objective import Optimum
from search.solve import solve
from service.cli.allocate import allocation_json
from service.cli.exits import exits, leave_with, plan_exit
from service.cli.options import DEFAULT_SERVER, Json, KeyFile, Server
from service.cli.output import console, print_json, show_conflict, show_reference
from service.cli.remote import client_of, is_remote, plan_named
from service.cli.spread import spread
from service.cli.table_question import SolverOptions
from service.explaining import explanation_json

Target = Annotated[
    str,
    typer.Argument(
        metavar="TABLE.json|PLAN|JOB",
        help="Scores and resources; or a plan of a server (or a job with one plan), as it was asked.",
    ),
]
Draws = Annotated[
    int, typer.Option("--draws", min=0, max=1000, help="Draws of the scores within their standard errors.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the draws.")]
COLUMNS = ("layers", "scheme", "stable", "margin", "next best", "a step up", "a step down")


@spread
def explain(
    target: Target,
    asked: SolverOptions,
    draws: Draws = DRAWS,
    seed: Seed = 0,
    server: Server = DEFAULT_SERVER,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Say why each layer got its scheme and what limits, pins, ties and rules cost; or why nothing fits."""
    with exits(as_json=as_json):
        if is_remote(target):
            asked.require_none(asked.metric)
            with client_of(server, key_file) as client:
                found = plan_named(client, target).explanation(draws, seed)
        else:
            question = asked.question(Path(target))
            solution = solve(
                question.compiled().problem,
                solver=asked.solver,
                gap=asked.gap,
                time_limit=asked.time_limit,
                prices=True,
            )
            found = allocation_json(question, Sum(), Optimum(solution))
            if solution.choice is not None:
                shown = explanation_of(question, solution, draws=draws, seed=seed, seconds=asked.time_limit)
                found = {"status": solution.status.value, "fused": found["fused"], **explanation_json(shown)}
        if as_json:
            print_json(found)
        else:
            _show(found)
        leave_with(plan_exit([found["status"]]))


def _show(found: Mapping[str, Any]) -> None:
    if not found.get("decisions"):
        console().print(f"No plan to explain: {found['status']}.", markup=False)
        show_conflict(found["conflict"])
        return
    console().print(_decisions(found))
    for one in found.get("fused", ()):
        console().print(f"fused: {' + '.join(one['layers'])} at {one['scheme']}", markup=False)
    for name, price in found["shadow_prices"].items():
        console().print(f"price of {name}: {price:.4g} per unit", markup=False)
    for one in found["restrictions"]:
        console().print(_relief(one), markup=False)
    console().print(f"a margin above {found['excess']:.3g} is proven", markup=False)
    show_reference(found["reference"])


def _decisions(found: Mapping[str, Any]) -> Table:
    plan, optimum = found["objective"], found["optimum"]
    measured = "" if plan == optimum else f" (the scores alone: {optimum:.6g})"
    draws = f", {found['stability']['draws']} draws" if found["stability"]["draws"] else ""
    table = Table(*COLUMNS, title=f"{found['metric']}: {plan:.6g}{measured}{draws}", title_justify="left")
    for one in found["decisions"]:
        table.add_row(
            escape(" + ".join(one["layers"])),
            one["scheme"],
            "" if one["stability"] is None else f"{one['stability']:.0%}",
            "" if one["margin"] is None else f"{one['margin']:.3g}",
            one["alternative"] or "",
            _step(one["up"]),
            _step(one["down"]),
        )
    return table


def _step(one: Mapping[str, Any] | None) -> str:
    """For example "w4 -0.012, bytes +4096": what changes."""
    if one is None:
        return ""
    changes = [f"{name} {value:+,.10g}" for name, value in one["resources"].items() if value]
    return ", ".join((f"{one['scheme']} {one['loss']:+.3g}", *changes[:2]))


def _relief(one: Mapping[str, Any]) -> str:
    name = one["name"] if one["kind"] == "all" else f"{one['kind']} {one['name']}"
    more = f" or more ({one['unscored']} choices have no score)" if one["unscored"] else ""
    if one["share"] is None:
        return f"{name}: not known in time"
    return f"{name}: costs {one['share']:.2%}{more} of the objective ({one['objective_without']:.6g} without)"
