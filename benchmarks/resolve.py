"""How long a new budget of a finished job takes through the HTTP API: a model of many layers, stored scores.

python benchmarks/resolve.py [--layers 300] [--budgets 60]

A job of invented layers and scores is written into a database of its own, as a runner leaves it. Then
`POST /v1/jobs/{id}/plans` is asked for one new budget after the other, in this process without a network:
the time is that of reading the request, the scores and layers, solving, storing the plan and answering.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from quant.layers import Inventory, Layer
from sensitivity.units import InspectUnit
from service.app import create_app
from service.db.repositories import jobs, leases, score_sets, scores, units
from service.db.repositories.leases import Owner
from service.records import ScoreRecord
from service.settings import Settings
from service.states import JobKind, JobState
from service.wire import JobRequest

SCHEMES = ("w2", "w3", "w4", "w5", "w6", "w8", "fp8", "mxfp4")
METRIC = "output_kl"
DIGEST = "0" * 64
LEASE_SECONDS = 600
WARMUP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--budgets", type=int, default=60)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder) / "data")
        with TestClient(create_app(settings)) as http:
            job = finished_job(http.app.state.context, options.layers)
            report(http, job, options)


def report(http: TestClient, job: str, options: argparse.Namespace) -> None:
    """Ask for budget after budget and print the times."""
    seconds, processor, solved, statuses = [], [], [], set()
    for bits in np.linspace(2.6, 7.4, options.budgets + WARMUP):
        started, used = time.perf_counter(), time.process_time()
        response = http.post(f"/v1/jobs/{job}/plans", json={"budgets": [f"{bits:.4f} bpw"]})
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
        response.raise_for_status()
        (plan,) = response.json()["items"]
        solved.append(plan["seconds"])
        statuses.add(plan["status"])
    milliseconds = sorted(1e3 * second for second in seconds[WARMUP:])
    print(f"{options.layers} layers x {len(SCHEMES)} schemes, {len(milliseconds)} budgets, {statuses}")
    busy = 1e3 * statistics.median(processor[WARMUP:])
    slow, solve = np.quantile(milliseconds, 0.95), 1e3 * statistics.median(solved[WARMUP:])
    print(
        f"median {statistics.median(milliseconds):.1f} ms, 95 % below {slow:.1f} ms; the solve {solve:.1f} ms"
    )
    print(f"processor time of a whole request: {busy:.1f} ms at the median")


def finished_job(context: Any, layers: int) -> str:
    """A search job that succeeded, with its inventory and scores; gives its id."""
    found = inventory(layers)
    asked = JobRequest.model_validate(
        {
            "model": "model_of_the_benchmark",
            "calibration": "calibration_of_the_benchmark",
            "budgets": ["4 bpw"],
            "schemes": list(SCHEMES),
            "metrics": [METRIC],
        }
    )
    request = asked.model_dump(mode="json")
    with context.database.write() as session:
        job = jobs.create(session, kind=JobKind.SEARCH, request=request, request_digest=DIGEST)
        held = leases.claim_job(session, job.id, Owner("benchmark", "host", 1, "process"), LEASE_SECONDS)
        assert held is not None, "nobody else claims jobs of this database"
        score_sets.ensure(session, DIGEST, {"seed": 0})
        facts = {"inventory": found.as_json(), "task": "causal_lm", "available_metrics": [METRIC]}
        units.insert(
            session,
            score_set=DIGEST,
            key=InspectUnit().key,
            kind="inspect",
            unit={"unit": "inspect"},
            facts=facts,
            artifact=None,
            job_id=job.id,
        )
        leases.set_score_set(session, job.id, held.epoch, DIGEST)
        scores.insert(session, score_rows(found))
        leases.finish(session, job.id, held.epoch, JobState.SUCCEEDED)
    return str(job.id)


def inventory(layers: int) -> Inventory:
    """Blocks of seven linear layers of four shapes, as Llama-type models have them."""
    shapes = [(512, 512), (128, 512), (128, 512), (512, 512), (1536, 512), (1536, 512), (512, 1536)]
    found = []
    for number in range(layers):
        rows, columns = shapes[number % len(shapes)]
        name = f"model.layers.{number // len(shapes)}.linear_{number % len(shapes)}"
        size = rows * columns
        found.append(
            Layer(name, "linear", (rows, columns), (rows, columns), size, size, "other", (), "float32")
        )
    total = sum(layer.parameters for layer in found)
    return Inventory(tuple(found), (), total, total * 4)


def score_rows(found: Inventory) -> list[ScoreRecord]:
    """Losses that fall with the bits around each layer's own scale."""
    random = np.random.default_rng(0)
    bits = {scheme: float(next((c for c in scheme if c.isdigit()), "4")) for scheme in SCHEMES}
    scale = dict(zip(found.by_name, np.abs(random.normal(size=len(found.layers))), strict=True))
    return [
        ScoreRecord(
            DIGEST,
            layer,
            scheme,
            METRIC,
            float(scale[layer] * 4.0 ** -bits[scheme] * random.uniform(0.5, 1.5)),
            1e-6,
            8,
            f"score:{layer}:{scheme}",
        )
        for layer, scheme in product(scale, SCHEMES)
    ]


if __name__ == "__main__":
    main()
