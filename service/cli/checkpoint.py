"""`bitplan apply` and `bitplan evaluate`: a plan on the model's own weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from quant.plan import Plan, parse_plan
from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, interval, print_json
from service.local import Local, local_settings
from service.wire import JobRequest

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="The Hugging Face folder the plan was made for.")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file.")]


def apply(
    model: ModelDir,
    plan: PlanFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Apply to other weights of the same shapes; the checkpoint says so."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a loadable checkpoint whose weights are quantized and dequantized as planned."""
    with exits(as_json=as_json):
        from quant.checkpoint import apply_plan

        written = apply_plan(model, read_plan(plan), output, force=force)
        if as_json:
            print_json({"output": str(output), **asdict(written)})
        else:
            console().print(f"wrote {output}")


def evaluate(
    model: ModelDir,
    plan: Annotated[Path, typer.Option("--plan", help="A plan file.")],
    data: Annotated[
        Path, typer.Option("--data", help="Data: .safetensors, .txt or .jsonl, all of it is used.")
    ],
    task: options.Task = "auto",
    sequence_length: options.SequenceLength = 512,
    samples: Annotated[int, typer.Option("--samples", min=8, help="At most this many samples.")] = 100_000,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    batch_size: options.BatchSize = 8,
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
) -> None:
    """Measure a plan beside full precision on data of your own, with 95 % intervals."""
    with exits(as_json=as_json), Local(local_settings(data_dir)) as local:
        wanted = read_plan(plan)
        record, sample_set = local.folder(model), local.calibration(data)
        request = JobRequest(
            model=record.id,
            calibration=sample_set.id,
            budgets=["1 GB"],
            task=task,
            sequence_length=sequence_length,
            samples=samples,
            seed=seed,
            device=device,  # type: ignore[arg-type]
            batch_size=batch_size,
            include=list(wanted.layers),
        )
        spec = local.spec(request, record, sample_set)
        full, planned = local.measure(spec, [{}, wanted.assignment])
        _show(wanted, {"full_precision": full, "plan": planned}, as_json=as_json)


def read_plan(path: Path) -> Plan:
    """The plan of a file. Raises OSError or PlanError."""
    return parse_plan(path.read_text(encoding="utf-8"))


def _show(plan: Plan, measured: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({**measured, "bytes": plan.totals.bytes, "bits_per_weight": plan.totals.bits_per_weight})
        return
    names = sorted(measured["plan"]["quality"])
    table = Table("", "bits/weight", "divergence", *names)
    for title, row in measured.items():
        bits = f"{plan.totals.bits_per_weight:.3f}" if title == "plan" else ""
        cells = [interval(row["quality"][name]) for name in names]
        table.add_row(title.replace("_", " "), bits, interval(row["divergence"]), *cells)
    console().print(table)
