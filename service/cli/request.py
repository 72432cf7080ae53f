"""From command options to the parameters of a search: the same for `run` and `submit`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from quant.costs import read_latency_table
from service.cli import options
from service.costing import DEVICE, MEASURED, ROOFLINE

DEFAULT_METRIC = "output_kl"


def job_parameters(
    *,
    budgets: list[str] | None,
    schemes: str,
    limits: list[str] | None,
    metrics: list[str] | None,
    task: str,
    samples: int,
    sequence_length: int,
    seed: int,
    device: str,
    pins: list[str] | None,
    ties: list[str] | None,
    exclude: list[str] | None,
    include: list[str] | None,
    latency_table: Path | None,
    time_limit: float,
    gap: float,
    runtime: str | None,
    costs: dict[str, Any],
    evaluations: int,
    relative_error: float,
    max_probes: int,
    batch_size: int,
    no_interactions: bool,
) -> dict[str, Any]:
    """The keyword parameters of `Client.submit` (without model and calibration). Raises ValueError."""
    if not budgets:
        raise ValueError('A budget must be given. Got none. Add for example --budget "3.5 bpw".')
    return {
        "budgets": budgets,
        "schemes": [scheme.strip() for scheme in schemes.split(",") if scheme.strip()],
        "limits": limits or [],
        "metrics": metrics or [DEFAULT_METRIC],
        "task": task,
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
        "device": device,
        "pins": options.assignments(pins),
        "ties": options.names(ties),
        "exclude": exclude or [],
        "include": include or [],
        "latency_ns": None if latency_table is None else _latency(latency_table),
        "time_limit_seconds": time_limit,
        "gap": gap,
        "runtime": runtime,
        **costs,
        "evaluations": evaluations,
        "relative_error": relative_error,
        "max_probes": max_probes,
        "batch_size": batch_size,
        "interactions": not no_interactions,
    }


def cost_parameters(
    *,
    latency: str | None,
    energy: str | None,
    device_profile: Path | None,
    context_length: int | None,
    serving_batch: int,
    kv_cache: str,
) -> dict[str, Any]:
    """The parameters of a request that decide latency, energy and memory. Raises ValueError, OSError."""
    given: dict[str, Any] = {
        "latency": _source(latency, (MEASURED, ROOFLINE)),
        "energy": _source(energy, (DEVICE,)),
        "device_profile": None if device_profile is None else json.loads(device_profile.read_text("utf-8")),
        "deployment": None,
    }
    if context_length is not None or serving_batch != 1:
        deployment = {"batch": serving_batch, "kv_cache": kv_cache}
        given["deployment"] = deployment | (
            {} if context_length is None else {"context_length": context_length}
        )
    return given


def _source(text: str | None, words: tuple[str, ...]) -> Any:
    """A word of the request, or the table in a file."""
    return text if text is None or text.startswith(words) else _latency(Path(text))


def _latency(path: Path) -> dict[str, dict[str, float]]:
    text = path.read_text(encoding="utf-8")
    table = read_latency_table(text, "csv" if path.suffix.lower() == ".csv" else "json")
    return {layer: {scheme: float(value) for scheme, value in row.items()} for layer, row in table.items()}


def file_of(output: Path, budget: str, *, several: bool) -> Path:
    """Where the plan of `budget` goes: `output` itself, or a file of that folder when there are several.

    >>> file_of(Path("plans"), "bytes<=2 MiB", several=True).as_posix()
    'plans/bytes-at-most-2-MiB.plan.json'
    """
    if not several:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    output.mkdir(parents=True, exist_ok=True)
    words = budget.replace("<=", " at most ").replace(">=", " at least ")
    return output / (re.sub(r"[^A-Za-z0-9.]+", "-", words).strip("-") + ".plan.json")
