"""What is asked of one budget, as values that identify it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quant.digest import digest
from search.budget import Limit, parse_budget, parse_limits
from search.objectives.catalog import DEFAULT, parse_objective
from search.problem import DEFAULT_GAP
from sensitivity.catalog import SCORERS
from sensitivity.contexts import without_context
from service.costing import cost_request


@dataclass(frozen=True)
class Ask:
    """One budget ("" for none) and what holds with it. `pins` and `ties` may be patterns over layer names,
    `protect` those of layers that get the largest scheme they may have; `runtime` is a key of RUNTIMES whose
    rules hold too, `costs` the members of the request that say what latency, energy and memory are,
    `contexts` the one that says what scores are split by, `forbid` are schemes that layers, or those of a
    pattern, must not get, `role_limits` those of a role's layers or of a pattern's, `objective` is what is
    solved for, as written.
    """

    budget: str
    limits: tuple[str, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    metric: str | None = None
    time_limit_seconds: float = 60.0
    gap: float = DEFAULT_GAP
    runtime: str | None = None
    costs: Mapping[str, Any] = field(default_factory=dict)
    protect: tuple[str, ...] = ()
    contexts: Mapping[str, Any] | None = None
    role_limits: Mapping[str, str] = field(default_factory=dict)
    objective: str = DEFAULT
    forbid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def named_metrics(self) -> tuple[str, ...]:
        """The metrics that objective, budget and limits name, beside the deciding one."""
        own = parse_objective(self.objective).metrics
        return tuple(dict.fromkeys((*own, *limited_metrics(self.all_limits))))

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        """The budget's limits and the others: all must hold. Raises BudgetError."""
        budget = parse_budget(self.budget).limits if self.budget else ()
        return (*budget, *parse_limits(self.limits))

    @property
    def text(self) -> str:
        """Every limit as it was written, for the plan document."""
        scoped = (f"{key}: {limit}" for key, limit in self.role_limits.items())
        return ",".join((self.budget, *self.limits, *scoped))

    @classmethod
    def of(cls, request: Mapping[str, Any], budget: str, metric: str) -> Ask:
        """What a job request, its members as JSON, asks of one budget; the inverse of `as_request`, with what
        that leaves out.
        """
        return cls(
            budget=budget,
            limits=tuple(request["limits"]),
            pins=dict(request["pins"]),
            ties=tuple(tuple(tie) for tie in request["ties"]),
            metric=metric,
            time_limit_seconds=request["time_limit_seconds"],
            gap=request["gap"],
            runtime=request.get("runtime"),
            costs=cost_request(request).members,
            protect=tuple(request.get("protect", ())),
            contexts=request.get("contexts"),
            forbid={key: tuple(names) for key, names in request.get("forbid", {}).items()},
            role_limits=dict(request.get("role_limits", {})),
            objective=request.get("objective", DEFAULT),
        )

    def as_request(self, metric: str) -> dict[str, Any]:
        """The members of a job request that this question replaces."""
        return {
            "budgets": [self.budget],
            "limits": list(self.limits),
            "pins": dict(self.pins),
            "ties": [list(tie) for tie in self.ties],
            "metrics": [without_context(metric)],
            "time_limit_seconds": self.time_limit_seconds,
            "gap": self.gap,
            "runtime": self.runtime,
            "protect": list(self.protect),
            "forbid": {key: list(names) for key, names in self.forbid.items()},
            "role_limits": dict(self.role_limits),
            "objective": self.objective,
            **self.costs,
        }

    def settings_digest(self, menu: Sequence[str]) -> str:
        """Identifies everything but the budget that the answer depends on."""
        return digest(
            {
                "limits": list(self.limits),
                "pins": dict(self.pins),
                "ties": [list(tie) for tie in self.ties],
                "metric": self.metric,
                "time_limit_seconds": float(self.time_limit_seconds),
                "gap": float(self.gap),
                "schemes": list(menu),
            }
            | ({} if self.runtime is None else {"runtime": self.runtime})
            | ({"costs": dict(self.costs)} if self.costs else {})
            | ({"protect": list(self.protect)} if self.protect else {})
            | ({"contexts": dict(self.contexts)} if self.contexts else {})
            | ({"forbid": {key: list(names) for key, names in self.forbid.items()}} if self.forbid else {})
            | ({"role_limits": dict(self.role_limits)} if self.role_limits else {})
            | ({} if self.objective == DEFAULT else {"objective": self.objective})
        )


def limited_metrics(limits: Iterable[Limit]) -> tuple[str, ...]:
    """The metrics among what limits are on."""
    return tuple(limit.resource for limit in limits if without_context(limit.resource) in SCORERS)
