"""`bitplan apply` and `bitplan evaluate`: a plan on the model's own weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, interval, print_json
from service.cli.plan_files import read_plan
from service.cli.run import own_model

if TYPE_CHECKING:
    from quant.apply import InputsOf
    from quant.plan import Plan
    from sensitivity.spec import ModelSource, SessionSpec
    from service.local_inputs import LocalData

CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", help="The plan's calibration file, for quantizers that go by it."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Take other weights than the plan was made for, of the same shapes.")
]


def apply(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="The Hugging Face folder the plan was made for.")
    ],
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    calibration: CalibrationFile = None,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a loadable checkpoint whose weights are quantized and dequantized as planned."""
    with exits(as_json=as_json, interrupted="no checkpoint was written"):
        wanted = read_plan(plan)

        from quant.checkpoint import apply_plan, require_inputs

        require_inputs(wanted, given=calibration is not None)
        inputs = _inputs(wanted, model, calibration, force=force)
        written = apply_plan(model, wanted, output, force=force, inputs=inputs)
        if as_json:
            print_json({"output": str(output), **asdict(written)})
        else:
            console().print(f"wrote {output}", markup=False)


def _inputs(plan: Plan, model: Path, calibration: Path | None, *, force: bool) -> InputsOf | None:
    """Statistics for the plan's quantizers; None where none of them needs any."""
    if calibration is None or not plan.needs_calibration:
        return None
    from service.local_inputs import folder_source
    from service.plan_statistics import statistics, statistics_spec

    return statistics(statistics_spec(plan, folder_source(model), calibration, force=force))


def evaluate(
    plan: Annotated[Path, typer.Option("--plan", help="A plan file.")],
    data: Annotated[
        Path, typer.Option("--data", help="Data: .safetensors, .txt or .jsonl, all of it is used.")
    ],
    model: options.ModelDir = None,
    factory: options.Factory = None,
    task: options.Task = "auto",
    sequence_length: options.SequenceLength = 512,
    samples: Annotated[int, typer.Option("--samples", min=8, help="At most this many samples.")] = 100_000,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    batch_size: options.BatchSize = 8,
    calibration: CalibrationFile = None,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Measure a plan beside full precision on data of your own, with 95 % intervals. Stores nothing."""
    with exits(as_json=as_json, interrupted="nothing was stored"):
        wanted = read_plan(plan)

        from service.local import local_settings
        from service.local_inputs import file_data
        from service.one_off import measure

        settings, read = local_settings(), file_data(data)
        found = own_model(model, factory, settings)
        _require_same_model(wanted, found, force=force)
        chosen = {
            "task": task,
            "sequence_length": sequence_length,
            "samples": samples,
            "seed": seed,
            "device": device,
            "batch_size": batch_size,
        }
        spec = _spec(wanted, found, read, chosen)
        if wanted.needs_calibration:
            spec = _with_statistics(spec, wanted, calibration, force=force)
        full, planned = measure(settings, spec, [{}, wanted.assignment])
        _show(wanted, {"full_precision": full, "plan": planned}, as_json=as_json)


def _require_same_model(plan: Plan, model: ModelSource, *, force: bool) -> None:
    if plan.digests.model != model.digest and not force:
        raise ValueError(
            f"Plan must be made for this model. Got a plan for {plan.digests.model or 'no digest'}, and the "
            f"model {model.digest}. Pass the plan's own model, or --force."
        )


def _with_statistics(spec: SessionSpec, plan: Plan, calibration: Path | None, *, force: bool) -> SessionSpec:
    """The plan's own weights are measured, not those that quantizers would make of the new data."""
    from quant.checkpoint import require_inputs
    from service.plan_statistics import statistics_spec

    require_inputs(plan, given=calibration is not None)
    assert calibration is not None
    return replace(spec, statistics=statistics_spec(plan, spec.model, calibration, force=force))


def _spec(plan: Plan, model: ModelSource, data: LocalData, chosen: dict[str, Any]) -> SessionSpec:
    from service.runner.inputs import spec_of
    from service.wire import JobRequest

    request = JobRequest.model_validate(
        {
            "model": "model",
            "calibration": "data",
            "budgets": ["32 bpw"],
            "include": list(plan.layers),
            **chosen,
        }
    )
    return spec_of(request, model, data.source)


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
