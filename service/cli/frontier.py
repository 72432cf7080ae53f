"""`bitplan frontier`: what each amount of a resource buys, as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from search.frontier import between as plans_between
from search.frontier import frontier as supported
from service.cli.exits import exits
from service.cli.options import DEFAULT_SERVER, Json, KeyFile, Server
from service.cli.output import console, print_json
from service.cli.plot import plot
from service.cli.remote import client_of, is_remote
from service.cli.spread import spread
from service.cli.table_question import TableOptions
from service.explaining import frontier_json, stretch_json, totals_between

Target = Annotated[
    str, typer.Argument(metavar="TABLE.json|JOB", help="Scores and resources; or a search of a server.")
]
Resource = Annotated[str, typer.Option("--resource", help="bytes, bits_per_weight, latency_ns ...")]
Between = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--between", help='Every Pareto-optimal plan between two totals: --between "1 MiB" "2 MiB".'
    ),
]
Points = Annotated[int, typer.Option("--points", min=2, max=200, help="At most this many plans.")]


@spread
def frontier(
    target: Target,
    asked: TableOptions,
    resource: Resource = "bytes",
    between: Between = None,
    points: Points = 100,
    server: Server = DEFAULT_SERVER,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Show the plans that nothing beats in both the metric and a resource, each with its proof."""
    with exits(as_json=as_json):
        if is_remote(target):
            asked.require_none()
            with client_of(server, key_file) as client:
                found = client.job(target).trade_off(
                    resource, metric=asked.metric, between=between, points=points
                )
        else:
            compiled = asked.question(Path(target)).compiled()
            if between is None:
                answer = frontier_json(compiled, supported(compiled, resource, most=points))
            else:
                low, high = totals_between(resource, between)
                answer = stretch_json(compiled, plans_between(compiled, resource, low, high, most=points))
            found = {"resource": resource, "metric": compiled.metric, **answer}
        if as_json:
            print_json(found)
        else:
            _show(found)


def _show(found: Mapping[str, Any]) -> None:
    items, resource, metric = found["items"], found["resource"], found["metric"]
    if not items:
        console().print("No plan is there.", markup=False)
    table = Table(resource, metric, "gap", "proof")
    for column in table.columns[:3]:
        column.justify = "right"
    for one in items:
        price = one["price"]
        proof = "best of at most this" if price is None else f"optimal at {price:.4g} per unit"
        table.add_row(
            f"{one['resources'][resource]:,.10g}", f"{one['objective']:.6g}", f"{one['gap']:.2g}", proof
        )
    if len(items) > 1:
        dots = [(float(one["resources"][resource]), float(one["objective"])) for one in items]
        console().print(plot(dots, resource, metric), markup=False)
    console().print(table)
    if found.get("next_between"):
        low, high = found["next_between"]
        console().print(f"some are left out: --between {low} {high} has them", markup=False)
