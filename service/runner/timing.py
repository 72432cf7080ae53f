"""Timing kernels on a worker's device, and keeping the timings per device in the data directory."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant.latency import Case
from sensitivity.spec import SessionSpec
from sensitivity.units import TimingUnit
from service.costing import Timings, timings_from_json
from service.runner.context import JobContext
from service.runner.dispatch import run_alone
from service.runner.problems import problem_of_failure

KERNEL_SESSION = "sensitivity.kernels:KernelSession"


def timed(context: JobContext, spec: SessionSpec, cases: Sequence[Case]) -> Timings:
    """Timings of all cases on the device of `spec`: cached ones where this device has them, else fresh.

    Kernels are timed one after the other in one worker, so that they do not disturb each other. Raises
    `ServiceError` when the device has no kernels, and what `context.check` raises.
    """
    folder = context.settings.data_dir / "latency"
    cached = read_cache(folder)
    wanted = {case.key for case in cases}
    known = {name: tuple(wanted & set(kept.timings)) for name, kept in cached.items()}
    unit = TimingUnit(tuple(case.as_json() for case in cases), known)
    outcome = run_alone(context, spec, unit, session_factory=KERNEL_SESSION, workers=1)
    if outcome.failure is not None:
        raise problem_of_failure(outcome.failure, {"unit": "timing"})
    assert outcome.result is not None
    fresh = timings_from_json(outcome.result.facts)
    before = cached[fresh.fingerprint].timings if fresh.fingerprint in cached else {}
    everything = Timings(fresh.fingerprint, {**before, **fresh.timings})
    if fresh.timings:
        write_cache(folder, everything, outcome.result.facts["device"])
    chosen = {key: timing for key, timing in everything.timings.items() if key in wanted}
    return Timings(fresh.fingerprint, chosen)


def read_cache(folder: Path) -> dict[str, Timings]:
    """Fingerprint -> its timings; a file that cannot be read counts as absent."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            kept = timings_from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[kept.fingerprint] = kept
    return found


def write_cache(folder: Path, timings: Timings, device: Any) -> None:
    """Replace the file of one device; another process that writes at the same time only costs its timings."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}"
    temporary.write_text(
        json.dumps({**timings.as_json(), "device": device}, sort_keys=True), encoding="utf-8"
    )
    os.replace(temporary, folder / f"{timings.fingerprint}.json")
