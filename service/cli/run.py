"""`bitplan run`: the whole job on this machine, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from service.cli import options
from service.cli.exits import CommandError, Exit, exits, plan_exit
from service.cli.output import JobProgress, console, duration, print_json, show_plans, size
from service.cli.request import cost_parameters, file_of, job_parameters
from service.estimate import estimate
from service.local import Local, local_settings
from service.records import CalibrationRecord, JobRecord, ModelRecord
from service.states import JobState
from service.wire import JobRequest


def run(
    calibration: options.Calibration,
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL_DIR", help="A Hugging Face folder with safetensors weights."),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option("--factory", help="package.module:function of your own that returns an nn.Module."),
    ] = None,
    budgets: options.Budgets = None,
    schemes: options.Schemes = options.DEFAULT_SCHEMES,
    limits: options.Limits = None,
    metrics: options.Metrics = None,
    task: options.Task = "auto",
    samples: options.Samples = 64,
    sequence_length: options.SequenceLength = 512,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    pins: options.Pins = None,
    ties: options.Ties = None,
    exclude: options.Excludes = None,
    include: options.Includes = None,
    latency_table: options.Latency = None,
    time_limit: options.TimeLimit = 60.0,
    gap: options.Gap = 1e-9,
    runtime: options.Runtime = None,
    latency: options.LatencySource = None,
    energy: options.EnergySource = None,
    device_profile: options.DeviceProfile = None,
    context_length: options.ContextLength = None,
    serving_batch: options.ServingBatch = 1,
    kv_cache: options.CacheType = "float16",
    evaluations: options.Evaluations = 40,
    relative_error: options.RelativeError = 0.1,
    max_probes: options.MaxProbes = 128,
    batch_size: options.BatchSize = 8,
    no_interactions: options.NoInteractions = False,
    output: options.Output = None,
    data_dir: options.DataDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be measured, in what time and memory.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure, solve and prove on this machine; run it again to go on after an interruption."""
    with exits(as_json=as_json):
        costs = cost_parameters(
            latency=latency, energy=energy, device_profile=device_profile, context_length=context_length,
            serving_batch=serving_batch, kv_cache=kv_cache,
        )  # fmt: skip
        parameters = job_parameters(
            budgets=budgets, schemes=schemes, limits=limits, metrics=metrics, task=task, samples=samples,
            sequence_length=sequence_length, seed=seed, device=device, pins=pins, ties=ties, exclude=exclude,
            include=include, latency_table=latency_table, time_limit=time_limit, gap=gap,
            runtime=runtime, costs=costs,
            evaluations=evaluations, relative_error=relative_error, max_probes=max_probes,
            batch_size=batch_size, no_interactions=no_interactions,
        )  # fmt: skip
        with Local(local_settings(data_dir)) as local:
            found = _model(local, model, factory)
            data = local.calibration(calibration)
            request = local.request(found, data, parameters)
            if dry_run:
                _show_estimate(_estimate(local, request, found, data), as_json=as_json)
                return
            plans = _run(local, request, as_json=as_json)
        _finish(plans, request.budgets, output, as_json=as_json)


def _model(local: Local, model: Path | None, factory: str | None) -> ModelRecord:
    if (model is None) == (factory is None):
        raise ValueError(
            "A model must be given as MODEL_DIR or as --factory. Got both or none. Name one of them."
        )
    return local.folder(model) if model is not None else local.factory(str(factory))


def _run(local: Local, request: JobRequest, *, as_json: bool) -> list[dict[str, Any]]:
    with JobProgress(quiet=as_json) as bar:
        job = local.run(request, bar)
    if job.state != JobState.SUCCEEDED:
        raise CommandError(*_reason(job))
    return local.plans(job.id)


def _reason(job: JobRecord) -> tuple[str, Exit]:
    """Why the job did not succeed; what the user sent wrong has the exit status of bad input."""
    if job.state in (JobState.QUEUED, JobState.CANCELLED, JobState.CANCELLING):
        return f"{job.id} is {job.state}: run the same command again to go on", Exit.INTERRUPTED
    problem: Mapping[str, Any] = job.problem or {}
    sent = int(problem.get("status", 500)) < 500
    return str(problem.get("detail", job.state)), Exit.BAD_INPUT if sent else Exit.FAILED


def _finish(plans: list[dict[str, Any]], budgets: list[str], output: Path | None, *, as_json: bool) -> None:
    from quant.digest import canonical_json

    show_plans(plans, as_json=as_json)
    for plan in plans:
        if output is not None and plan["document"] is not None:
            file = file_of(output, plan["budget"], several=len(budgets) > 1)
            file.write_text(canonical_json(plan["document"]), encoding="utf-8")
            if not as_json:
                console().print(f"wrote {file}")
    code = plan_exit([plan["status"] for plan in plans])
    if code is not Exit.DONE:
        raise typer.Exit(int(code))


def _estimate(
    local: Local, request: JobRequest, model: ModelRecord, data: CalibrationRecord
) -> dict[str, Any]:
    inspection = local.inspect(local.spec(request, model, data))
    return estimate(request, inspection, local.settings.workers)


def _show_estimate(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    table = Table("what would be measured", "", title_justify="left")
    table.add_row("task", f"{found['task']}, measured by {found['divergence']}")
    table.add_row("layers", f"{found['layers']} with {found['parameters']:,} weights")
    table.add_row(
        "left out", "\n".join(f"{item['name']}: {item['reason']}" for item in found["excluded"]) or "nothing"
    )
    table.add_row("samples", ", ".join(f"{part} {count}" for part, count in found["samples"].items()))
    for name, forwards in found["forwards"].items():
        table.add_row(f"forward passes, {name}", f"{forwards:,}")
    table.add_row("time", f"about {duration(found['seconds'])} with {found['workers']} workers")
    table.add_row("memory", f"about {size(found['bytes_per_worker'])} per worker")
    console().print(table)
