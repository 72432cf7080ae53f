"""Commands that talk to a server: the same verbs as the API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from service.cli import options
from service.cli.exits import CommandError, Exit, exits, plan_exit
from service.cli.output import JobProgress, console, print_json, show_plans
from service.cli.request import cost_parameters, file_of, job_parameters
from service.client import Client
from service.remote.handles import JobHandle, PlanHandle

JobId = Annotated[str, typer.Argument(help="Id of a job, as `bitplan jobs` lists it.")]
Watch = Annotated[bool, typer.Option("--watch", help="Stay, show progress, and print the plans at the end.")]


def submit(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or the id of a model the server has.")],
    calibration: options.Calibration,
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
    watch: Watch = False,
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
) -> None:
    """Send a model and calibration data to a server and start a search there."""
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
        job = Client(server).submit(model=model, calibration=calibration, **parameters)
        if not (watch or output):
            _print_job(job, as_json=as_json)
            return
        _follow(job, as_json=as_json)
        _finish(job.plans(), parameters["budgets"], output, as_json=as_json)


def models(server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False) -> None:
    """List the models that the server has."""
    with exits(as_json=as_json):
        rows = Client(server).models()
        if as_json:
            print_json(rows)
        else:
            _table(("id", "state", "created_at"), rows)


def jobs(server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False) -> None:
    """List the jobs of the server, the newest first."""
    with exits(as_json=as_json):
        rows = [job.resource for job in Client(server).jobs()]
        if as_json:
            print_json(rows)
        else:
            _table(("id", "state", "stage", "name", "created_at"), rows)


def status(
    job: JobId, server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False
) -> None:
    """Show where one job stands."""
    with exits(as_json=as_json):
        _print_job(Client(server).job(job), as_json=as_json)


def watch(job: JobId, server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False) -> None:
    """Follow a job to its end and show its plans. Ctrl-C leaves the job running."""
    with exits(as_json=as_json):
        handle = Client(server).job(job)
        _follow(handle, as_json=as_json)
        show_plans([plan.resource for plan in handle.plans()], as_json=as_json)


def cancel(
    job: JobId, server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False
) -> None:
    """Stop a job; its scores are kept."""
    with exits(as_json=as_json):
        _print_job(Client(server).job(job).cancel(), as_json=as_json)


def resume(
    job: JobId, server: options.Server = options.DEFAULT_SERVER, as_json: options.Json = False
) -> None:
    """Go on from the scores of a job that failed or was cancelled, as a new job."""
    with exits(as_json=as_json):
        _print_job(Client(server).job(job).resume(), as_json=as_json)


def scores(
    job: JobId,
    metric: Annotated[str | None, typer.Option("--metric", help="Only this metric.")] = None,
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
) -> None:
    """Show what each layer loses in each scheme, with standard errors."""
    with exits(as_json=as_json):
        rows = [vars(score) for score in Client(server).job(job).scores(metric)]
        if as_json:
            print_json(rows)
        else:
            _table(("layer", "scheme", "metric", "value", "stderr", "samples"), rows)


def plan(
    job: JobId,
    budgets: options.Budgets = None,
    limits: options.Limits = None,
    pins: options.Pins = None,
    ties: options.Ties = None,
    metric: Annotated[str | None, typer.Option("--metric", help="A stored metric of the job.")] = None,
    time_limit: options.TimeLimit = 60.0,
    gap: options.Gap = 1e-9,
    runtime: options.Runtime = None,
    latency: options.LatencySource = None,
    energy: options.EnergySource = None,
    device_profile: options.DeviceProfile = None,
    context_length: options.ContextLength = None,
    serving_batch: options.ServingBatch = 1,
    kv_cache: options.CacheType = "float16",
    output: options.Output = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure evidence for the new plans too.")
    ] = False,
    server: options.Server = options.DEFAULT_SERVER,
    as_json: options.Json = False,
) -> None:
    """Plan from stored scores, in milliseconds: an existing budget of the job, or any other."""
    with exits(as_json=as_json):
        wanted = _required(budgets)
        costs = cost_parameters(
            latency=latency, energy=energy, device_profile=device_profile, context_length=context_length,
            serving_batch=serving_batch, kv_cache=kv_cache,
        )  # fmt: skip
        handle = Client(server).job(job)
        solved = handle.solve(
            wanted,
            limits=limits,
            pins=options.assignments(pins) if pins is not None else None,
            ties=options.names(ties) if ties is not None else None,
            metric=metric,
            time_limit_seconds=time_limit,
            gap=gap,
            runtime=runtime,
            **costs,
        )
        if measure:
            solved = [_measured(one) for one in solved]
        _finish(solved, wanted, output, as_json=as_json)


def _measured(plan: PlanHandle) -> PlanHandle:
    if plan.document is not None:
        plan.measure().wait()
    return plan.refresh()


def _required(budgets: list[str] | None) -> list[str]:
    if not budgets:
        raise ValueError('A budget must be given. Got none. Add for example --budget "3.5 bpw".')
    return budgets


def _follow(job: JobHandle, *, as_json: bool) -> None:
    with JobProgress(quiet=as_json) as bar:
        job.wait(on_progress=bar)


def _finish(
    plans: Sequence[PlanHandle], budgets: Sequence[str], output: Path | None, *, as_json: bool
) -> None:
    code = plan_exit([plan.status for plan in plans])
    show_plans([plan.resource for plan in plans], as_json=as_json)
    if output is not None:
        for one in plans:
            if one.document is not None:
                console_path = one.save(file_of(output, one.resource["budget"], several=len(budgets) > 1))
                if not as_json:
                    console().print(f"wrote {console_path}")
    if code is not Exit.DONE:
        raise typer.Exit(int(code))


def _print_job(job: JobHandle, *, as_json: bool) -> None:
    if as_json:
        print_json(job.resource)
        return
    progress = job.resource.get("progress") or {}
    stage = (
        f", {job.resource['stage']} {progress.get('done')}/{progress.get('total')}"
        if job.resource["stage"]
        else ""
    )
    console().print(f"{job.id}  {job.state}{stage}")
    problem = job.resource.get("problem")
    if problem:
        raise CommandError(str(problem.get("detail") or problem.get("title")))


def _table(columns: Sequence[str], rows: Sequence[Any]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    console().print(table)
