"""The options that describe a search, the same for `run` and `submit`, and the request that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.objectives.catalog import DEFAULT
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
    kv_cache_type: options.CacheType = "float16"

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
        if (self.context_length, self.serving_batch, self.kv_cache_type) == (None, 1, "float16"):
            return None
        deployment: dict[str, Any] = {"batch": self.serving_batch, "kv_cache": self.kv_cache_type}
        if self.context_length is not None:
            deployment["context_length"] = self.context_length
        return deployment


@dataclass(frozen=True)
class SearchOptions(CostOptions):
    """What to search for, as it was typed."""

    budgets: options.Budgets = None
    targets: options.Targets = None
    schemes: options.Schemes = None
    kv_cache: options.CacheTypes = None
    limits: options.Limits = None
    metrics: options.Metrics = None
    refine_metric: options.RefineMetric = None
    time_budget: options.TimeBudget = None
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
    objective: options.Objective = None
    evaluations: options.Evaluations = 40
    chooser: options.ChooserName = "local_search"
    relative_error: options.RelativeError = 0.1
    max_probes: options.MaxProbes = 128
    batch_size: options.BatchSize = 8
    memory_limit: options.MemoryLimit = None
    no_interactions: options.NoInteractions = False
    corrections: options.Corrections = None
    role_metrics: options.RoleMetrics = None
    roles: options.Roles = None
    role_limits: options.RoleLimits = None
    ratios: options.Ratios = None
    protect: options.Protect = None
    forbid: options.Forbid = None
    contexts: options.ContextPlans = None
    timestep_edges: options.TimestepEdges = None
    context_weights: options.ContextWeights = None

    def parameters(self) -> dict[str, Any]:
        """The keyword parameters of `Client.submit` (without model and calibration). Raises ValueError."""
        return {
            "budgets": (self.budgets or [])
            if self.targets
            else required(self.budgets, "A budget or a target"),
            "targets": self.targets or [],
            **({} if self.schemes is None else {"schemes": options.names([self.schemes])[0]}),
            "kv_cache": [] if self.kv_cache is None else options.names([self.kv_cache])[0],
            "limits": self.limits or [],
            "metrics": self.metrics or [DEFAULT_METRIC],
            "refine_metric": self.refine_metric,
            "time_budget_seconds": options.seconds(self.time_budget),
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
            "objective": self.objective or DEFAULT,
            **self.cost_parameters(),
            "evaluations": self.evaluations,
            "chooser": self.chooser,
            "relative_error": self.relative_error,
            "max_probes": self.max_probes,
            "batch_size": self.batch_size,
            "memory_limit": self.memory_limit,
            "interactions": not self.no_interactions,
            "corrections": self.corrections or [],
            "role_metrics": options.assignments(
                self.role_metrics, "A metric of a role", "ROLE=METRIC", "cross_attention=ssim"
            ),
            "roles": options.assignments(self.roles, "A role", "LAYER=ROLE", "*.proj_out=head"),
            "role_limits": options.role_limits(self.role_limits) or {},
            **({} if self.ratios is None else {"ratios": self.ratios}),
            "protect": self.protect or [],
            "forbid": options.forbidden(self.forbid),
            "contexts": self._contexts(),
        }

    def _contexts(self) -> dict[str, Any] | None:
        """How scores are split; None where no option says so. Raises ValueError."""
        if self.contexts is None and not self.timestep_edges and not self.context_weights:
            return None
        named = options.assignments(self.context_weights, "A weight", "CONTEXT=NUMBER", "code=2")
        return {
            "plans": self.contexts or "weighted",
            "edges": self.timestep_edges or [],
            "weights": {name: _number(text) for name, text in named.items()},
        }


def several_plans(parameters: Mapping[str, Any]) -> bool:
    """Whether a request may give more than one plan."""
    each = (parameters.get("contexts") or {}).get("plans") == "each"
    return each or len(parameters["budgets"]) + len(parameters["targets"]) > 1


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'A weight must be a number, as in "code=2". Got {text!r}.') from None


def required(budgets: list[str] | None, what: str = "A budget") -> list[str]:
    """The budgets, of which there must be one. Raises ValueError."""
    if not budgets:
        raise ValueError(f'{what} must be given. Got none. Add for example --budget "3.5 bpw".')
    return budgets


def _source(text: str | None, words: tuple[str, ...]) -> Any:
    """A word of the request as it is, or the table in a file."""
    return text if text is None or text.startswith(words) else _latency(Path(text))


def _latency(path: Path) -> dict[str, dict[str, float]]:
    from quant.costs import read_latency_table

    text = path.read_text(encoding="utf-8")
    table = read_latency_table(text, "csv" if path.suffix.lower() == ".csv" else "json")
    return {layer: {scheme: float(value) for scheme, value in row.items()} for layer, row in table.items()}
