"""`bitplan run`: the whole job on this machine, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from service.cli import options
from service.cli.exits import CommandError, Exit, exits, leave_with, plan_exit
from service.cli.output import (
    JobProgress,
    console,
    duration,
    print_json,
    show_plans,
    show_warnings,
    show_work,
    size,
)
from service.cli.plan_files import check_output, file_of, title_of
from service.cli.request import SearchOptions, several_plans
from service.cli.spread import spread

if TYPE_CHECKING:
    from sensitivity.spec import ModelSource
    from service.local_inputs import LocalData
    from service.records import JobRecord
    from service.settings import Settings

AGAIN = "run the same command again to go on where it stopped"


@spread
def run(
    calibration: options.Calibration,
    search: SearchOptions,
    model: options.ModelDir = None,
    factory: options.Factory = None,
    hub: options.Hub = None,
    user_metric: options.UserMetric = None,
    output: options.Output = None,
    data_dir: options.DataDir = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Measure, solve and prove on this machine; run it again to go on after an interruption."""
    with exits(as_json=as_json, interrupted=AGAIN):
        from service.local import local_settings
        from service.local_inputs import file_data

        parameters = {**search.parameters(), "user_metric": user_metric}
        check_output(output, several=several_plans(parameters))
        settings, data = local_settings(data_dir), file_data(calibration)
        found = own_model(model, factory, hub, settings, as_json=as_json)
        if dry_run:
            show_preview(settings, found, data, parameters, as_json=as_json)
            return
        plans, summary = _run(settings, found, data, parameters, as_json=as_json)
        show_plans(plans, as_json=as_json)
        if not as_json:
            show_work(summary)
        _write(plans, output, several=several_plans(parameters), as_json=as_json)
        leave_with(plan_exit([plan["status"] for plan in plans]))


def own_model(
    model: Path | None, factory: str | None, hub: str | None, settings: Settings, *, as_json: bool
) -> ModelSource:
    """The model of a folder, a factory or a hub, whichever is given. Raises ValueError or ServiceError."""
    from service.local_inputs import factory_source, folder_source

    given = sum(source is not None for source in (model, factory, hub))
    if given != 1:
        raise ValueError(
            f"A model must be given as MODEL_DIR, as --factory or as --hub. Got {given} of them. Name one."
        )
    if factory is not None:
        return factory_source(factory, settings)
    if hub is not None:
        return fetched(hub, settings, as_json=as_json)
    assert model is not None
    return folder_source(model)


def fetched(hub: str, settings: Settings, *, as_json: bool) -> ModelSource:
    """The model of a hub, in the data directory; with a bar. Raises BadReference, ServiceError."""
    from service.hub.reference import parse_reference
    from service.local import Local

    wanted = parse_reference(hub)
    with Local(settings) as local, JobProgress(quiet=as_json) as bar:
        return local.hub_model(wanted, bar)


def _run(
    settings: Settings, model: ModelSource, data: LocalData, parameters: Mapping[str, Any], *, as_json: bool
) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    from service.local import Local

    with Local(settings) as local:
        request = local.request(local.model(model), local.calibration(data), parameters)
        with JobProgress(quiet=as_json) as bar:
            job = local.run(request, bar)
        require_success(job)
        show_warnings(job.summary)
        return local.plans(job.id), job.summary or {}


def require_success(job: JobRecord) -> None:
    """Raise why the job did not succeed; what the user sent wrong has the exit status of bad input."""
    from service.states import JobState

    if job.state == JobState.CANCELLED:
        raise CommandError(f"{job.id} was cancelled: {AGAIN}.", Exit.INTERRUPTED)
    if job.state != JobState.SUCCEEDED:
        problem: Mapping[str, Any] = job.problem or {}
        sent = int(problem.get("status", 500)) < 500
        raise CommandError(str(problem.get("detail", job.state)), Exit.BAD_INPUT if sent else Exit.FAILED)


def _write(plans: Sequence[Mapping[str, Any]], output: Path | None, *, several: bool, as_json: bool) -> None:
    from quant.digest import canonical_json

    for plan in plans:
        if output is not None and plan["document"] is not None:
            file = file_of(output, title_of(plan), several=several)
            file.write_text(canonical_json(plan["document"]), encoding="utf-8")
            if not as_json:
                console().print(f"wrote {file}", markup=False)
        elif output is not None and not as_json:
            _say_unwritten(file_of(output, title_of(plan), several=several))


def _say_unwritten(file: Path) -> None:
    older = "; the one there is from an earlier run" if file.exists() else ""
    console().print(f"did not write {file}{older}", markup=False)


def memory_words(memory: Mapping[str, Any]) -> str:
    """What a worker keeps out of its memory."""
    gradients = memory["gradients"]
    lines = [
        f"{size(memory['limit'])} of anonymous memory, {size(memory['loaded'])} of it in use when loaded",
        f"{size(memory['mapped'])} of weights stay in their files",
        f"gradients of one sample through the whole model: {size(gradients['whole'])}",
    ]
    if memory["streamed"]:
        lines.append(
            f"gradients are streamed over {gradients['blocks']} blocks, {size(gradients['step'])} at a time,"
            f" {size(gradients['spilled'])} per sample in files"
        )
    elif gradients["fault"] is not None:
        lines.append(f"gradients cannot be streamed: {gradients['fault']}")
    else:
        lines.append("nothing is streamed")
    return "\n".join(lines)


def show_preview(
    settings: Settings, model: ModelSource, data: LocalData, parameters: Mapping[str, Any], *, as_json: bool
) -> None:
    """Print what would be measured; budgets that cannot be met have the exit status of infeasible plans."""
    from service.estimate import preview

    found = preview(settings, model, data.source, parameters)
    if as_json:
        print_json(found)
    else:
        console().print(_preview_table(found))
        show_warnings(found)
    leave_with(plan_exit(["optimal" if told["can_be_met"] else "infeasible" for told in found["budgets"]]))


def _preview_table(found: Mapping[str, Any]) -> Table:
    table = Table("what would be measured", "", title_justify="left")
    table.add_row("task", f"{found['task']}, measured by {found['divergence']}")
    table.add_row("layers", f"{found['layers']} with {found['parameters']:,} weights")
    if found["caches"]:
        table.add_row("key-value caches", f"{len(found['caches'])}: {found['caches'][0]} and so on")
    table.add_row(
        "left out", "\n".join(f"{item['name']}: {item['reason']}" for item in found["excluded"]) or "nothing"
    )
    table.add_row("samples", ", ".join(f"{part} {count}" for part, count in found["samples"].items()))
    table.add_row("samples at a time", f"{found['batch_size']}")
    scores = found["scores"]
    table.add_row("scores", f"{scores['wanted']:,}, of which {scores['stored']:,} are stored")
    if found["picked"]:
        table.add_row("metric auto", found["picked"]["why"])
    table.add_row("metrics", ", ".join(found["metrics"]))
    table.add_row("a choice costs", _reuse_words(found["reuse"]))
    for name, forwards in found["forwards"].items():
        table.add_row(f"forward passes, {name}", f"{forwards:,}")
    table.add_row(
        "time", f"about {duration(found['seconds'] + 1)} after loading, with {found['workers']} workers"
    )
    table.add_row("memory", f"about {size(found['bytes_per_worker'])} per worker")
    if found["memory"] is not None:
        table.add_row("under the limit", memory_words(found["memory"]))
    for told in found["budgets"]:
        table.add_row(f"budget {told['budget']}", _met_words(told))
    return table


def _met_words(told: Mapping[str, Any]) -> str:
    if told["can_be_met"]:
        return "can be met"
    least = ", ".join(f"{name} {value:g}" for name, value in told["least_budget"].items())
    return f"CANNOT be met: {told['reason']}; least budget: {least or 'none'}"


def _reuse_words(reuse: Mapping[str, Any]) -> str:
    if reuse["whole"]:
        return f"a whole forward pass per sample: {reuse['whole']}"
    blocks = f"runs begin at the first of {reuse['blocks']} blocks that changes"
    return f"{reuse['share']:.2f} of a forward pass per sample: {blocks}"
