"""`bitplan apply` and `bitplan checkpoint`: a model's weights as a plan stores them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quant.catalog import CHECKPOINTS
from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, print_json, size
from service.cli.plan_files import read_plan
from service.consumers import require_consumer

if TYPE_CHECKING:
    from quant.checkpoints.front import Written
    from quant.checkpoints.protocol import Layout
    from quant.checkpoints.source import Source
    from quant.export.protocol import Deployment
    from quant.plan import Plan

NOTHING = "no checkpoint was written"
ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="The Hugging Face folder the plan was made for.")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file.")]


def apply(
    model: ModelDir,
    plan: PlanFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    calibration: options.PlanCalibration = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a loadable checkpoint whose weights are quantized and dequantized as planned."""
    with exits(as_json=as_json, interrupted=NOTHING):
        wanted = read_plan(plan)

        from quant.checkpoints.front import plan_deployment
        from quant.checkpoints.source import Source

        source = Source.open(model)
        deployment = plan_deployment(wanted, source)
        written = _written("pytorch", source, deployment, output, calibration, force=force)
        if as_json:
            print_json({"output": str(output), **written.provenance.as_json()})
        else:
            console().print(f"wrote {output}", markup=False)


def checkpoint(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_DIR|ID",
            help="The Hugging Face folder the plan was made for; or a plan or job of a server.",
        ),
    ],
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN.json", help="A plan file, with MODEL_DIR.")
    ] = None,
    *,
    to: Annotated[str, typer.Option("--to", help=f"Who loads it: {', '.join(CHECKPOINTS)}.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder, or new file, for the checkpoint.")
    ] = None,
    calibration: options.PlanCalibration = None,
    force: options.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which files there would be, and their exact sizes.")
    ] = False,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Write the quantized weights as a runtime loads them, or say which layer breaks which of its rules."""
    with exits(as_json=as_json, interrupted=NOTHING):
        from quant.checkpoints.front import layout

        require_consumer(to, CHECKPOINTS)
        if output is None and not dry_run:
            raise ValueError("--output must name the checkpoint. Got none. Pass -o OUT, or --dry-run.")
        if plan is None:
            _remote(model, to, output, server, key_file, force=force, as_json=as_json)
        elif output is None or dry_run:
            source, deployment = _deployment(Path(model), read_plan(plan))
            _show(layout(to, source, deployment, force=force), as_json=as_json)
        else:
            _write(Path(model), read_plan(plan), to, output, calibration, force=force, as_json=as_json)


def _deployment(model: Path, plan: Plan) -> tuple[Source, Deployment]:
    from quant.checkpoints.source import Source
    from quant.export.protocol import Deployment
    from service.model_facts import model_facts

    return Source.open(model), Deployment(plan, model_facts(model, plan))


def _write(
    model: Path, plan: Plan, to: str, output: Path, calibration: Path | None, *, force: bool, as_json: bool
) -> None:
    source, deployment = _deployment(model, plan)
    written = _written(to, source, deployment, output, calibration, force=force)
    _told(output, {**written.provenance.as_json(), **written.layout.as_json()}, as_json=as_json)


def _written(
    to: str, source: Source, deployment: Deployment, output: Path, calibration: Path | None, *, force: bool
) -> Written:
    """Write it. What is wrong with the model or the plan is said before what is wrong with the data."""
    from quant.checkpoints.front import layout, require_corrected, require_inputs, write

    layout(to, source, deployment, force=force)
    require_inputs(deployment.plan, given=calibration is not None)
    require_corrected(deployment.plan, given=calibration is not None)
    found = _from_calibration(deployment.plan, source.folder, calibration, force=force)
    return write(to, source, deployment, output, force=force, **found)


def _remote(
    plan: str, to: str, output: Path | None, server: str, key_file: Path | None, *, force: bool, as_json: bool
) -> None:
    """Have a server write the checkpoint of one of its plans, and fetch it."""
    from service.cli.remote import client_of, follow, plan_named

    if not plan.startswith(("plan_", "job_")) or Path(plan).exists():
        raise ValueError(
            f"A model's folder must come with a plan. Got {plan!r} alone. Pass MODEL_DIR PLAN.json, or the id"
            " of a server's plan or job (plan_..., job_...)."
        )
    if output is None:
        raise ValueError("--dry-run must have the model here. Got a server's plan. Pass MODEL_DIR PLAN.json.")
    with client_of(server, key_file, patient=True) as client:
        handle = plan_named(client, plan)
        job = handle.write_checkpoint(to, force=force)
        follow(job, as_json=as_json)
        handle.save_checkpoint(to, output)
        _told(output, {"job": job.id, **job.resource["summary"]}, as_json=as_json)


def _told(output: Path, facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **facts})
    else:
        console().print(f"wrote {output}, {facts['bytes']:,} bytes", markup=False)


def _show(layout: Layout, *, as_json: bool) -> None:
    if as_json:
        print_json(layout.as_json())
        return
    table = Table("file", "bytes", "of tensors", "")
    for column in table.columns[1:]:
        column.justify = "right"
    for file in layout.files:
        table.add_row(file.name, f"{file.bytes:,}", f"{file.payload_bytes:,}", size(file.bytes))
    total = ("all", f"{layout.bytes:,}", f"{layout.payload_bytes:,}", size(layout.bytes))
    table.add_row(*total, style="bold")
    console().print(table)
    console().print(f"{layout.planned_bytes:,} of these bytes store the weights of the plan's layers")


def _from_calibration(plan: Plan, model: Path, calibration: Path | None, *, force: bool) -> dict[str, Any]:
    """Arguments of `front.write`: what the plan needs from its data; none where it needs nothing."""
    if calibration is None or not plan.reads_calibration:
        return {}
    from service.local_inputs import folder_source
    from service.plan_statistics import from_calibration, statistics_spec

    spec = statistics_spec(plan, folder_source(model), calibration, force=force)
    return vars(from_calibration(plan, spec))
