"""Commands that talk to a server: the same verbs as the API."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from service.cli import options
from service.cli.exits import exits, leave_with, plan_exit
from service.cli.output import JobProgress, console, print_json, show_plans, show_warnings, show_work
from service.cli.plan_files import check_output, file_of, title_of
from service.cli.request import CostOptions, SearchOptions, required, several_plans
from service.cli.run import own_model, show_preview
from service.cli.spread import spread

if TYPE_CHECKING:
    from service.client import Client
    from service.remote.handles import JobHandle, PlanHandle

SECRET = "BITPLAN_WEBHOOK_SECRET"  # noqa: S105 - the name of a variable
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `bitplan jobs` lists it.")]
Watch = Annotated[bool, typer.Option("--watch", help="Stay, show progress, and print the plans at the end.")]
WebhookUrl = Annotated[
    str | None,
    typer.Option("--webhook", metavar="URL", help="Told of the job's end by a signed POST; needs a secret."),
]
WebhookSecret = Annotated[
    str | None,
    typer.Option(
        "--webhook-secret",
        envvar=SECRET,
        show_envvar=True,
        help="Signs the message: whsec_ and 24 to 64 random bytes in base64. Better in the variable, or in "
        "the file that BITPLAN_WEBHOOK_SECRET_FILE names.",
    ),
]
Deadline = Annotated[
    str | None,
    typer.Option(
        "--deadline",
        metavar="WHEN",
        help="When the job must have ended, else it is expired and its scores are kept: 90m, 6h, 2d from "
        "now, or a time with its zone (2026-12-01T18:00Z).",
    ),
]
MINUTES = {"m": 1, "h": 60, "d": 24 * 60}
SHORT_TRIES = 2
"""Repeated requests of a command that answers at once: a server that is away is told within a second."""
GOES_ON = (
    "a job that was started goes on at the server: follow it with `bitplan jobs` and `bitplan watch JOB`"
)


@spread
def submit(
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            "-c",
            help="A .safetensors, .npz, .txt, .jsonl or .parquet file, or an id of the server's.",
        ),
    ],
    search: SearchOptions,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A Hugging Face folder, or the id of a model the server has."),
    ] = None,
    hub: options.Hub = None,
    output: options.Output = None,
    watch: Watch = False,
    deadline: Deadline = None,
    webhook: WebhookUrl = None,
    webhook_secret: WebhookSecret = None,
    dry_run: options.DryRun = False,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Send a model and calibration data to a server and start a search there; -o waits for its plans."""
    with exits(as_json=as_json, interrupted=GOES_ON):
        parameters = search.parameters()
        told, ends_by = _receiver(webhook, webhook_secret), _moment(deadline)
        check_output(output, several=several_plans(parameters))
        if dry_run:
            _preview(model, hub, Path(calibration), parameters, as_json=as_json)
            return
        given = _one_model(model, hub)
        with client_of(server, key_file, patient=True) as client:
            with JobProgress(quiet=as_json) as bar:
                job = client.submit(
                    model=given if hub is None else client.hub_model(given)["id"],
                    calibration=calibration,
                    webhook=told,
                    deadline=ends_by,
                    on_bytes=lambda done, total: bar(_sending(done, total)),
                    **parameters,
                )
            if not (watch or output):
                _print_job(job, as_json=as_json)
                return
            follow(job, as_json=as_json)
            show_warnings(job.resource.get("summary"))
            _finish(job.plans(), output, job, several=several_plans(parameters), as_json=as_json)


def _sending(done: int, total: int) -> dict[str, Any]:
    """What a progress bar shows of an upload, in bytes."""
    return {"stage": "sending", "progress": {"done": done, "total": total}}


def models(
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """List the models that the server has."""
    with exits(as_json=as_json), client_of(server, key_file) as client:
        rows = [model if as_json else {**(model["summary"] or {}), **model} for model in client.models()]
        _show_rows(("id", "state", "model_type", "parameters", "created_at"), rows, as_json=as_json)


def jobs(
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """List the jobs of the server, the newest first."""
    with exits(as_json=as_json), client_of(server, key_file) as client:
        rows = [{**job.resource, **({} if as_json else _asked(job.resource))} for job in client.jobs()]
        _show_rows(("id", "state", "stage", "model", "budgets", "name", "created_at"), rows, as_json=as_json)


def status(
    job: JobId,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show where one job stands, and why it failed if it did."""
    with exits(as_json=as_json), client_of(server, key_file) as client:
        _print_job(client.job(job), as_json=as_json)


def watch(
    job: JobId,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Follow a job to its end and show its plans. Ctrl-C leaves the job running."""
    with exits(as_json=as_json, interrupted=GOES_ON), client_of(server, key_file, patient=True) as client:
        handle = client.job(job)
        follow(handle, as_json=as_json)
        _finish(handle.plans(), None, handle, as_json=as_json)


def cancel(
    job: JobId,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Stop a job; its scores are kept."""
    with exits(as_json=as_json), client_of(server, key_file) as client:
        _print_job(client.job(job).cancel(), as_json=as_json)


def resume(
    job: JobId,
    deadline: Deadline = None,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Go on from the scores of a job that failed, was cancelled or expired, as a new job."""
    with exits(as_json=as_json), client_of(server, key_file) as client:
        _print_job(client.job(job).resume(deadline=_moment(deadline)), as_json=as_json)


def scores(
    job: JobId,
    metric: Annotated[str | None, typer.Option("--metric", help="Only this metric.")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Also show each score's difference from that of this scheme, paired."),
    ] = None,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show what each layer loses in each scheme, with standard errors."""
    with exits(as_json=as_json), client_of(server, key_file) as client:
        rows = [vars(score) for score in client.job(job).scores(metric, against)]
        columns = ("layer", "scheme", "metric", "value", "stderr", "samples")
        paired = ("difference", "difference_stderr") if against else ()
        _show_rows((*columns, *paired), rows, as_json=as_json)


@spread
def plan(
    job: JobId,
    search: CostOptions,
    budgets: options.Budgets = None,
    limits: options.Limits = None,
    pins: options.Pins = None,
    ties: options.Ties = None,
    protect: options.Protect = None,
    forbid: options.Forbid = None,
    role_limits: options.RoleLimits = None,
    context: Annotated[
        str | None, typer.Option("--context", help="For a job with a plan per context: which one.")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="A stored metric of the job.")] = None,
    time_limit: options.TimeLimit = 60.0,
    gap: options.Gap = 1e-9,
    objective: options.Objective = None,
    output: options.Output = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure evidence for the new plans too.")
    ] = False,
    server: options.Server = options.DEFAULT_SERVER,
    key_file: options.KeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Plan from stored scores, in milliseconds: other budgets, limits, pins, ties, forbidden choices ..."""
    with exits(as_json=as_json, interrupted=GOES_ON), client_of(server, key_file, patient=measure) as client:
        wanted = required(budgets)
        check_output(output, several=len(wanted) > 1)
        solved = client.job(job).solve(
            wanted,
            limits=limits,
            pins=options.assignments(pins) if pins is not None else None,
            ties=options.names(ties) if ties is not None else None,
            protect=protect,
            forbid=None if forbid is None else options.forbidden(forbid),
            role_limits=options.role_limits(role_limits),
            metric=metric,
            context=context,
            time_limit_seconds=time_limit,
            gap=gap,
            objective=objective,
            **search.cost_parameters(),
        )
        if measure:
            solved = [_measured(one) for one in solved]
        _finish(solved, output, several=len(wanted) > 1, as_json=as_json)


def client_of(server: str, key_file: Path | None, *, patient: bool = False) -> Client:
    """A client that, unless it is patient, gives up on a server that is not there within a second."""
    from service.client import Client
    from service.remote.key import find_key

    if not server.startswith(("http://", "https://")):
        raise ValueError(
            f"--server must be an address that begins with http:// or https://. Got {server!r}. "
            f"Use for example {options.DEFAULT_SERVER}."
        )
    key = find_key(file=key_file)
    return Client(server, key=key) if patient else Client(server, key=key, retries=SHORT_TRIES)


def is_remote(name: str) -> bool:
    """Whether a word on the command line is the id of a server's plan or job, and no file here."""
    return name.startswith(("plan_", "job_")) and not Path(name).exists()


def plan_named(client: Client, name: str) -> PlanHandle:
    """A plan by its id, or by that of a job with one plan. Raises ValueError for a job with several."""
    if not name.startswith("job_"):
        return client.plan(name)
    found = [plan for plan in client.job(name).plans() if plan.document is not None]
    if len(found) != 1:
        named = ", ".join(f"{plan.id} ({plan.resource['budget']})" for plan in found) or "none"
        raise ValueError(f"A job must have one plan to be named by it. Got {named}. Pass the id of a plan.")
    return found[0]


def _receiver(url: str | None, secret: str | None) -> dict[str, str] | None:
    """The webhook of a request. Raises ValueError for one without a secret."""
    if url is None:
        return None
    from service.secret_files import named_files, read_value

    secret = secret or next((read_value(*named) for named in named_files([SECRET], os.environ).items()), None)
    if not secret:
        raise ValueError(
            f"--webhook must come with a secret. Got none. Set {SECRET} or {SECRET}_FILE; make one with"
            ' python -c "from service.webhooks.signing import new_secret; print(new_secret())".'
        )
    return {"url": url, "secret": secret}


def _moment(text: str | None) -> datetime | None:
    """A time with its zone, or one from now. Raises ValueError."""
    if text is None:
        return None
    if (span := re.fullmatch(r"(\d{1,6})([mhd])", text)) is not None:
        return datetime.now(UTC) + timedelta(minutes=int(span[1]) * MINUTES[span[2]])
    with suppress(ValueError):
        if (moment := datetime.fromisoformat(text)).tzinfo is not None:
            return moment
    raise ValueError(
        "--deadline must be a time from now (90m, 6h, 2d) or one with its zone (2026-12-01T18:00Z). Got "
        f"{text!r:.80}."
    )


def _one_model(model: str | None, hub: str | None) -> str:
    """Whichever of the two is given. Raises ValueError."""
    if (model is None) == (hub is None):
        got = "none" if model is None else "both"
        raise ValueError(f"A model must be given as MODEL or as --hub. Got {got}. Name one of them.")
    return model or hub or ""


def _preview(
    model: str | None, hub: str | None, calibration: Path, parameters: Mapping[str, Any], *, as_json: bool
) -> None:
    """What would be measured, estimated on this machine from the files that the server would have."""
    from service.local import local_settings
    from service.local_inputs import file_data

    settings = local_settings()
    source = own_model(None if model is None else Path(model), None, hub, settings, as_json=as_json)
    show_preview(settings, source, file_data(calibration), parameters, as_json=as_json)


def _measured(plan: PlanHandle) -> PlanHandle:
    if plan.document is not None:
        plan.measure().wait()
    return plan.refresh()


def follow(job: JobHandle, *, as_json: bool) -> None:
    """Wait for a job's end, with a bar. Raises JobFailed."""
    with JobProgress(quiet=as_json) as bar:
        job.wait(on_progress=bar)


def _finish(
    plans: Sequence[PlanHandle],
    output: Path | None = None,
    job: JobHandle | None = None,
    *,
    several: bool = False,
    as_json: bool,
) -> None:
    show_plans([plan.resource for plan in plans], as_json=as_json)
    summary = {} if job is None else job.resource.get("summary") or {}
    if "forwards" in summary and not as_json:
        show_work(summary)
    for one in plans:
        if output is not None and one.document is not None:
            written = one.save(file_of(output, title_of(one.resource), several=several))
            if not as_json:
                console().print(f"wrote {written}", markup=False)
    leave_with(plan_exit([plan.status for plan in plans]))


def _print_job(job: JobHandle, *, as_json: bool) -> None:
    if as_json:
        print_json(job.resource)
        return
    stage, progress = job.resource["stage"], job.resource.get("progress") or {}
    where = f", {stage} {progress.get('done')}/{progress.get('total')}" if stage else ""
    problem = job.resource.get("problem") or {}
    why = f": {problem.get('detail') or problem.get('title')}" if problem else ""
    console().print(f"{job.id}  {job.state}{where}{why}", markup=False, soft_wrap=True)


def _show_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(list(rows))
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def _asked(job: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one job from another in a list."""
    request = job["request"]
    return {"model": request.get("model", ""), "budgets": ", ".join(request.get("budgets", ()))}
