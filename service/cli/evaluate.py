"""`bitplan evaluate`: a plan measured beside full precision on data of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quant.geometry import CACHE_BITS
from quant.kv_cache import FULL, cache_scheme, cache_type
from quant.storage import SchemeError
from service.cli import options
from service.cli.exits import exits
from service.cli.output import console, interval, print_json
from service.cli.plan_files import read_plan
from service.cli.run import own_model

if TYPE_CHECKING:
    from quant.plan import Plan
    from sensitivity.spec import ModelSource, SessionSpec
    from service.local_inputs import LocalData

CacheTypes = Annotated[
    list[str] | None,
    typer.Option(
        "--kv-cache",
        help="Also measure the plan with such a key-value cache: int8, or LAYERS=int8 for some (repeat).",
    ),
]


def evaluate(
    plan: Annotated[Path, typer.Option("--plan", help="A plan file.")],
    data: Annotated[
        Path,
        typer.Option("--data", help="Data: .safetensors, .npz, .txt, .jsonl or .parquet, all of it is used."),
    ],
    model: options.ModelDir = None,
    factory: options.Factory = None,
    hub: options.Hub = None,
    task: options.Task = "auto",
    sequence_length: options.SequenceLength = 512,
    samples: Annotated[int, typer.Option("--samples", min=8, help="At most this many samples.")] = 100_000,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    batch_size: options.BatchSize = 8,
    memory_limit: options.MemoryLimit = None,
    calibration: options.PlanCalibration = None,
    kv_cache: CacheTypes = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Measure a plan beside full precision on data of your own, with 95 % intervals. Stores nothing."""
    with exits(as_json=as_json, interrupted="nothing was stored"):
        wanted = read_plan(plan)

        from service.local import local_settings
        from service.local_inputs import file_data
        from service.one_off import measure

        settings, read = local_settings(), file_data(data)
        found = own_model(model, factory, hub, settings, as_json=as_json)
        _require_same_model(wanted, found, force=force)
        chosen = {
            "task": task,
            "sequence_length": sequence_length,
            "samples": samples,
            "seed": seed,
            "device": device,
            "batch_size": batch_size,
            "memory_limit": memory_limit,
        }
        spec = _spec(wanted, found, read, chosen)
        if wanted.reads_calibration:
            spec = _with_statistics(spec, wanted, calibration, force=force)
        asked: dict[str, dict[str, str]] = {"full_precision": {}, "plan": wanted.assignment}
        if kv_cache:
            asked["plan_and_cache"] = wanted.weights | _caches(kv_cache)
        found_rows = measure(settings, spec, list(asked.values()), wanted.corrections or ())
        _show(wanted, dict(zip(asked, found_rows, strict=True)), as_json=as_json)


def _caches(texts: list[str]) -> dict[str, str]:
    """Pattern of attention layers -> scheme of its cache. Raises ValueError for an unknown type."""
    found = {}
    for text in texts:
        pattern, _, kind = text.rpartition("=")
        try:
            found[pattern or "*"] = cache_scheme(cache_type(kind, (FULL, *CACHE_BITS)))
        except SchemeError as error:
            raise ValueError(f"--kv-cache must be TYPE or LAYERS=TYPE. {error}") from None
    return found


def _require_same_model(plan: Plan, model: ModelSource, *, force: bool) -> None:
    if plan.digests.model != model.digest and not force:
        raise ValueError(
            f"Plan must be made for this model. Got a plan for {plan.digests.model or 'no digest'}, and the "
            f"model {model.digest}. Pass the plan's own model, or --force."
        )


def _with_statistics(spec: SessionSpec, plan: Plan, calibration: Path | None, *, force: bool) -> SessionSpec:
    """The plan's own weights are measured, not those that quantizers would make of the new data."""
    from quant.checkpoints.front import require_corrected, require_inputs
    from service.plan_statistics import statistics_spec

    require_inputs(plan, given=calibration is not None)
    require_corrected(plan, given=calibration is not None)
    assert calibration is not None
    return replace(spec, statistics=statistics_spec(plan, spec.model, calibration, force=force))


def _spec(plan: Plan, model: ModelSource, data: LocalData, chosen: dict[str, Any]) -> SessionSpec:
    from service.local import local_settings
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
    return spec_of(request, model, data.source, local_settings().memory_limit)


def _show(plan: Plan, measured: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({**measured, "bytes": plan.totals.bytes, "bits_per_weight": plan.totals.bits_per_weight})
        return
    names = sorted(measured["plan"]["quality"])
    table = Table("", "bits/weight", "divergence", *names)
    for title, row in measured.items():
        bits = "" if title == "full_precision" else f"{plan.totals.bits_per_weight:.3f}"
        cells = [interval(row["quality"][name]) for name in names]
        table.add_row(title.replace("_", " "), bits, interval(row["divergence"]), *cells)
    console().print(table)
