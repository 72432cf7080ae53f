"""`bitplan apply` and `bitplan checkpoint`: a model's weights as a plan stores them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quant.catalog import CHECKPOINTS
from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, print_json, size
from service.cli.plan_files import read_plan

if TYPE_CHECKING:
    from quant.checkpoints.protocol import Layout
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

        from quant.checkpoints.front import apply_plan, require_corrected, require_inputs

        require_inputs(wanted, given=calibration is not None)
        require_corrected(wanted, given=calibration is not None)
        found = _from_calibration(wanted, model, calibration, force=force)
        written = apply_plan(model, wanted, output, force=force, **found)
        if as_json:
            print_json({"output": str(output), **asdict(written.provenance)})
        else:
            console().print(f"wrote {output}", markup=False)


def checkpoint(
    model: ModelDir,
    plan: PlanFile,
    to: Annotated[str, typer.Option("--to", help=f"Who loads it: {', '.join(CHECKPOINTS)}.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder, or new file, for the checkpoint.")
    ] = None,
    calibration: options.PlanCalibration = None,
    force: options.Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which files there would be, and their exact sizes.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write the quantized weights as a runtime loads them, or say which layer breaks which of its rules."""
    with exits(as_json=as_json, interrupted=NOTHING):
        wanted = read_plan(plan)

        from quant.checkpoints import front
        from quant.checkpoints.source import Source
        from quant.export.protocol import Deployment
        from service.cli.export import model_facts

        front.checkpoint_of(to)
        if output is None and not dry_run:
            raise ValueError("--output must name the checkpoint. Got none. Pass -o OUT, or --dry-run.")
        if not dry_run:
            front.require_inputs(wanted, given=calibration is not None)
            front.require_corrected(wanted, given=calibration is not None)
        source = Source.open(model)
        deployment = Deployment(wanted, model_facts(model, wanted))
        if output is None or dry_run:
            _show(front.layout(to, source, deployment, force=force), as_json=as_json)
            return
        found = _from_calibration(wanted, model, calibration, force=force)
        written = front.write(to, source, deployment, output, force=force, **found)
        if as_json:
            told = {"output": str(output), **asdict(written.provenance), **written.layout.as_json()}
            print_json(told)
        else:
            console().print(f"wrote {output}, {written.layout.bytes:,} bytes", markup=False)


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
    if calibration is None or not (plan.needs_calibration or plan.corrections):
        return {}
    from service.local_inputs import folder_source
    from service.plan_statistics import from_calibration, statistics_spec

    spec = statistics_spec(plan, folder_source(model), calibration, force=force)
    return vars(from_calibration(plan, spec))
