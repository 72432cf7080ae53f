"""What is counted, for Prometheus. Each process counts in its own registry of this module.

The API answers ``GET /metrics`` with its own registry, with gauges that it reads from the database at that
moment (`service.db.repositories.gauges`), and with what each runner last wrote into its row when it said
that it lives (`of_runner`): one address tells everything, and no runner needs a port.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from service.records import Gauges, RunnerRecord

API = CollectorRegistry()
RUNNER = CollectorRegistry()
QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LONG = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3600.0)

REQUESTS = Counter("bitplan_http_requests", "Requests answered.", ("method", "route", "status"), registry=API)
REQUEST_SECONDS = Histogram(
    "bitplan_http_request_seconds",
    "From the request to the end of its answer.",
    ("method", "route"),
    buckets=QUICK,
    registry=API,
)
RESOLVE_SECONDS = Histogram(
    "bitplan_resolve_seconds", "Solving a budget again, from stored scores.", buckets=QUICK, registry=API
)
KEPT_INPUTS = Counter(
    "bitplan_planning_inputs",
    "Planning inputs that requests asked for: kept in memory (hit) or read from the database (miss).",
    ("result",),
    registry=API,
)

STREAMS = Gauge("bitplan_event_streams", "Streams of events that are open.", registry=API)

WEBHOOK_ATTEMPTS = Counter(
    "bitplan_webhook_attempts",
    "Attempts to deliver a webhook: delivered, failed (to be tried again), or given_up.",
    ("outcome",),
    registry=RUNNER,
)
UNIT_SECONDS = Histogram(
    "bitplan_unit_seconds",
    "From handing a unit to the executor to its outcome; at most one other unit per worker is before it.",
    ("kind",),
    buckets=LONG,
    registry=RUNNER,
)
UNITS = Counter(
    "bitplan_units",
    "Units that jobs wanted: measured now, reused because they were stored (cache hits), or failed.",
    ("outcome",),
    registry=RUNNER,
)
WORKER_DEATHS = Counter("bitplan_worker_deaths", "Workers that died in a unit.", registry=RUNNER)
SOLVE_SECONDS = Histogram(
    "bitplan_solve_seconds", "The integer program of one budget.", buckets=QUICK, registry=RUNNER
)
JOB_SECONDS = Histogram(
    "bitplan_job_seconds",
    "From a claim to its end, by the kind of job and how it ended (released: given back to the queue).",
    ("kind", "state"),
    buckets=(*LONG, 4 * 3600.0, 24 * 3600.0),
    registry=RUNNER,
)
LEASES_LOST = Counter("bitplan_leases_lost", "Jobs that another runner took.", registry=RUNNER)
COLLECTED = Counter("bitplan_collected", "Things that retention has deleted.", ("what",), registry=RUNNER)
COLLECTED_BYTES = Counter(
    "bitplan_collected_bytes", "Bytes of files that retention has deleted.", ("what",), registry=RUNNER
)


@contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Observe how long the block takes, however it ends."""
    began = time.perf_counter()
    try:
        yield
    finally:
        histogram.observe(time.perf_counter() - began)


def of_runner() -> str:
    """What this process has counted as a runner, in the text format."""
    return generate_latest(RUNNER).decode()


def exposition(gauges: Gauges, runners: Iterable[RunnerRecord], alive_seconds: float) -> bytes:
    """Everything that this service knows of itself, in the text format of Prometheus.

    gauges          read from the database now
    alive_seconds   a runner that has been silent for longer is down
    """
    registry = CollectorRegistry(auto_describe=False)
    known = tuple(runners)
    registry.register(_Families([*_of_database(gauges), *_of_runners(known, alive_seconds)]))
    return generate_latest(API) + generate_latest(registry)


class _Families:
    """A collector of families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_database(gauges: Gauges) -> Iterator[Metric]:
    jobs = GaugeMetricFamily(
        "bitplan_jobs", "Jobs in the database; queued ones are the queue.", labels=("kind", "state")
    )
    for (kind, state), count in sorted(gauges.jobs.items()):
        jobs.add_metric((kind, state), count)
    yield jobs
    for name, text, value in (
        ("bitplan_queue_depth", "Jobs that wait for a runner.", gauges.queued),
        (
            "bitplan_queue_oldest_seconds",
            "Since the oldest waiting job was sent; 0 without one.",
            gauges.oldest_queued_seconds,
        ),
        ("bitplan_leases", "Jobs that a runner holds.", gauges.leases),
        ("bitplan_leases_expired", "Held jobs whose lease has ended: free to claim.", gauges.expired_leases),
        ("bitplan_blobs", "Files that tenants have sent.", gauges.blobs),
        ("bitplan_blob_bytes", "Their bytes.", gauges.blob_bytes),
        ("bitplan_store_free_bytes", "Left on the disk of the store.", gauges.free_bytes),
    ):
        yield GaugeMetricFamily(name, text, value)


def _of_runners(runners: tuple[RunnerRecord, ...], alive_seconds: float) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "bitplan_runner_up", "1: the runner has said that it lives; 0: it fell silent.", labels=("runner",)
    )
    seen = GaugeMetricFamily(
        "bitplan_runner_seen_seconds", "Since a runner last said that it lives.", labels=("runner",)
    )
    families: dict[str, Metric] = {}
    for runner in runners:
        up.add_metric((runner.label,), float(runner.seconds_ago <= alive_seconds))
        seen.add_metric((runner.label,), runner.seconds_ago)
        for family in text_string_to_metric_families(runner.metrics):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {**sample.labels, "runner": runner.label}, sample.value)
    return iter((up, seen, *families.values()))
