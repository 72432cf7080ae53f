"""`bitplan correlate`: which metric to trust on a model, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from service.cli import options
from service.cli.exits import exits, leave_with, plan_exit
from service.cli.output import JobProgress, console, print_json
from service.cli.request import SearchOptions
from service.cli.run import AGAIN, own_model, require_success
from service.cli.spread import spread

if TYPE_CHECKING:
    from sensitivity.spec import ModelSource
    from service.settings import Settings

SHOWN = ("random", "near")
"""Kinds of plans that have columns of their own; --json has all."""

OF_A_JOB = frozenset({"model", "budgets", "metrics", "plans", "server", "key_file", "as_json"})
"""Parameters that go with the id of a job."""

Target = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL_DIR|JOB",
        help="A Hugging Face folder; or a search of a server, of which only --budget, --metric and --plans "
        "may differ.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        "-c",
        help="Calibration data, with MODEL_DIR: .safetensors, .npz, .txt, .jsonl or .parquet.",
    ),
]
Plans = Annotated[
    int, typer.Option("--plans", help="So many random plans per budget, and so many near the optimum.")
]


@spread
def correlate(
    context: typer.Context,
    search: SearchOptions,
    model: Target = None,
    calibration: Data = None,
    factory: options.Factory = None,
    hub: options.Hub = None,
    user_metric: options.UserMetric = None,
    plans: Plans = 60,
    data_dir: options.DataDir = None,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Measure sampled plans at every budget, and show how well each metric ranks them.

    Every stored metric is judged, or those of --metric, which are measured if need be.
    """
    with exits(as_json=as_json, interrupted=AGAIN):
        from service.local import local_settings

        if model is not None and str(model).startswith("job_") and not model.exists():
            _refuse_others(context)
            found = _remote(str(model), search, plans, server, key_file, as_json=as_json)
        else:
            if calibration is None:
                raise ValueError("Calibration data must come with a model. Got none. Add --calibration FILE.")
            settings = local_settings(data_dir)
            source = own_model(model, factory, hub, settings, as_json=as_json)
            found = _local(settings, source, calibration, user_metric, search, plans, as_json=as_json)
        if as_json:
            print_json(found)
        else:
            console().print(correlation_tables(found))
            for note in found["notes"]:
                console().print(f"note: {note}", markup=False)
        leave_with(plan_exit([budget["status"] for budget in found["budgets"]]))


def _local(
    settings: Settings,
    source: ModelSource,
    calibration: Path,
    user_metric: str | None,
    search: SearchOptions,
    plans: int,
    *,
    as_json: bool,
) -> dict[str, Any]:
    from service.local import Local
    from service.local_inputs import file_data
    from service.wire import CorrelationJob

    parameters = {**search.parameters(), "user_metric": user_metric}
    data = file_data(calibration)
    with Local(settings) as local:
        request = local.request(local.model(source), local.calibration(data), parameters)
        asked = CorrelationJob(search=request, plans=plans, every_stored=not search.metrics)
        with JobProgress(quiet=as_json) as bar:
            job = local.correlate(asked, bar)
        require_success(job)
        return dict(job.summary or {})


def _refuse_others(context: typer.Context) -> None:
    """Raise ValueError for options that a search of a server has already decided."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in OF_A_JOB and _is_given(context, str(parameter.name))
    ]
    if given:
        raise ValueError(
            f"With a job's id only --budget, --metric and --plans may differ. Got {', '.join(given)}. "
            "Leave them out, or name a folder."
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _remote(
    job_id: str, search: SearchOptions, plans: int, server: str, key_file: Path | None, *, as_json: bool
) -> dict[str, Any]:
    from service.cli.remote import client_of, follow

    with client_of(server, key_file, patient=True) as client:
        handle = client.job(job_id)
        asked = handle.correlate(plans, budgets=search.budgets, metrics=search.metrics)
        follow(asked, as_json=as_json)
        return dict(asked.resource["summary"])


def correlation_tables(found: Mapping[str, Any]) -> Group:
    """One table per budget, the score model that ranks random plans best first."""
    return Group(*(_budget_table(found, budget) for budget in found["budgets"]))


def _budget_table(found: Mapping[str, Any], budget: Mapping[str, Any]) -> Table | str:
    if not budget["plans"]:
        least = ", ".join(f"{name} {value:g}" for name, value in budget["least_budget"].items())
        return f"{budget['budget']}: no plan fits{f'; the least budget is {least}' if least else ''}"
    counts = " and ".join(f"{budget['plans'][kind]['count']} {kind}" for kind in SHOWN)
    title = (
        f"{budget['budget']}: rank correlation with {counts} plans"
        f" ({found['divergence']} on {found['samples']} samples, 95 % intervals)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for kind in SHOWN:
        for name in ("Spearman", "Kendall"):
            table.add_column(f"{kind}, {name}", justify="right", no_wrap=True)
    for name in ("two halves", "told apart", "forwards"):
        table.add_column(name, justify="right", no_wrap=True)
    about = {one["name"]: one for one in found["scores"]}
    rows = _rows(budget["correlations"])
    for score in sorted(rows, key=lambda name: -_rank(rows[name].get(SHOWN[0]))):
        cells = [_cell(rows[score].get(kind), name) for kind in SHOWN for name in COEFFICIENTS]
        table.add_row(score, *cells, *_soundness(about[score]))
    ceiling = [_number(budget["plans"][kind]["reliability"]) for kind in SHOWN]
    table.add_row("[dim]two halves of the samples[/]", *(cell for one in ceiling for cell in (one, "")))
    return table


COEFFICIENTS = ("spearman", "kendall")


def _soundness(score: Mapping[str, Any]) -> tuple[str, str, str]:
    forwards = score["forwards"]
    return (
        _number(score["stability"]),
        "-" if score["resolved"] is None else f"{score['resolved']:.0%}",
        "-" if forwards is None else f"{forwards:,.0f}",
    )


def _rows(correlations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Score model -> kind of plans -> its coefficients."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in correlations:
        rows.setdefault(row["score"], {})[row["plans"]] = row
    return rows


def _rank(row: Mapping[str, Any] | None) -> float:
    return -2.0 if row is None or row["spearman"] is None else float(row["spearman"]["value"])


def _cell(row: Mapping[str, Any] | None, name: str) -> str:
    """For example ".91 [.85, .95]"; a dash where there is nothing to rank."""
    value = None if row is None else row[name]
    return "-" if value is None else f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
