"""The options that describe a search, the same for `run` and `submit`, and the request that they make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli import options

DEFAULT_METRIC = "output_kl"


@dataclass(frozen=True)
class CostOptions:
    """What will run the plans, and what they cost there, as it was typed."""

    runtime: options.Runtime = None
    latency: options.LatencySource = None
    energy: options.EnergySource = None
    device_profile: options.DeviceProfile = None
    context_length: options.ContextLength = None
    serving_batch: options.ServingBatch = 1
    kv_cache: options.CacheType = "float16"

    def cost_parameters(self) -> dict[str, Any]:
        """The parameters of a request that these options decide. Raises ValueError, OSError."""
        profile = self.device_profile
        return {
            "runtime": self.runtime,
            "latency": _source(self.latency, ("measured", "roofline:")),
            "energy": _source(self.energy, ("device:",)),
            "device_profile": None if profile is None else json.loads(profile.read_text(encoding="utf-8")),
            "deployment": self._deployment(),
        }

    def _deployment(self) -> dict[str, Any] | None:
        """How the model is served; None where no option says so."""
        if (self.context_length, self.serving_batch, self.kv_cache) == (None, 1, "float16"):
            return None
        deployment: dict[str, Any] = {"batch": self.serving_batch, "kv_cache": self.kv_cache}
        if self.context_length is not None:
            deployment["context_length"] = self.context_length
        return deployment


@dataclass(frozen=True)
class SearchOptions(CostOptions):
    """What to search for, as it was typed."""

    budgets: options.Budgets = None
    schemes: options.Schemes = None
    limits: options.Limits = None
    metrics: options.Metrics = None
    task: options.Task = "auto"
    samples: options.Samples = 64
    sequence_length: options.SequenceLength = 512
    seed: options.Seed = 0
    device: options.Device = "cpu"
    pins: options.Pins = None
    ties: options.Ties = None
    exclude: options.Excludes = None
    include: options.Includes = None
    latency_table: options.Latency = None
    time_limit: options.TimeLimit = 60.0
    gap: options.Gap = 1e-9
    evaluations: options.Evaluations = 40
    chooser: options.ChooserName = "local_search"
    relative_error: options.RelativeError = 0.1
    max_probes: options.MaxProbes = 128
    batch_size: options.BatchSize = 8
    no_interactions: options.NoInteractions = False
    corrections: options.Corrections = None

    def parameters(self) -> dict[str, Any]:
        """The keyword parameters of `Client.submit` (without model and calibration). Raises ValueError."""
        return {
            "budgets": required(self.budgets),
            **({} if self.schemes is None else {"schemes": options.names([self.schemes])[0]}),
            "limits": self.limits or [],
            "metrics": self.metrics or [DEFAULT_METRIC],
            "task": self.task,
            "samples": self.samples,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "device": self.device,
            "pins": options.assignments(self.pins),
            "ties": options.names(self.ties),
            "exclude": self.exclude or [],
            "include": self.include or [],
            "latency_ns": None if self.latency_table is None else _latency(self.latency_table),
            "time_limit_seconds": self.time_limit,
            "gap": self.gap,
            **self.cost_parameters(),
            "evaluations": self.evaluations,
            "chooser": self.chooser,
            "relative_error": self.relative_error,
            "max_probes": self.max_probes,
            "batch_size": self.batch_size,
            "interactions": not self.no_interactions,
            "corrections": self.corrections or [],
        }


def required(budgets: list[str] | None) -> list[str]:
    """The budgets, of which there must be one. Raises ValueError."""
    if not budgets:
        raise ValueError('A budget must be given. Got none. Add for example --budget "3.5 bpw".')
    return budgets


def _source(text: str | None, words: tuple[str, ...]) -> Any:
    """A word of the request as it is, or the table in a file."""
    return text if text is None or text.startswith(words) else _latency(Path(text))


def _latency(path: Path) -> dict[str, dict[str, float]]:
    from quant.costs import read_latency_table

    text = path.read_text(encoding="utf-8")
    table = read_latency_table(text, "csv" if path.suffix.lower() == ".csv" else "json")
    return {layer: {scheme: float(value) for scheme, value in row.items()} for layer, row in table.items()}
