"""From stored scores to plans: what the API's re-solve, the runner and the command share. No torch, no
database.

inputs = PlanningInputs(inventory, score_table(...), digests)      once per job
answer = solve_budget(inputs, Ask("3.5 bpw"))                      milliseconds per budget
answer.plan, answer.result                                         what is stored and shown
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from quant.costs import Latency, resources
from quant.digest import digest
from quant.layers import Inventory
from quant.lint import forbidden_schemes, fused_sets, require_choices
from quant.patterns import select
from quant.plan import Calibration, Certificate, Digests, Plan
from quant.planning import build_plan
from quant.runtimes import RUNTIMES
from quant.schemes import parse_scheme
from search.budget import Limit, parse_budget, parse_limits
from search.compile import Compiled, compile_problem, exact_number
from search.frontier import frontier
from search.problem import DEFAULT_GAP, Solution, Status
from search.solve import solve
from sensitivity.catalog import SCORERS
from sensitivity.table import MetricTable, ScoreTable, TableLayer
from sensitivity.units import ScoreRow
from service.costing import Costs
from service.records import ScoreRecord


class ScoresMissing(ValueError):  # noqa: N818 - named after what went wrong
    """Some (layer, scheme) of the menu has no score in the metric that decides."""


@dataclass(frozen=True, eq=False)
class PlanningInputs:
    """What does not depend on the budget. `menu` are the schemes a free layer may get; pins may name more.
    `sources` says where latency and energy came from, `calibration` how the data were read,
    `corrections` what plans change beside weights.
    """

    inventory: Inventory
    table: ScoreTable
    menu: tuple[str, ...]
    digests: Digests = field(default_factory=Digests)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Calibration | None = None
    corrections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """One budget and what holds with it. `pins` and `ties` may be patterns over layer names; `runtime` is a
    key of RUNTIMES whose rules hold too, `costs` the members of the request that say what latency, energy and
    memory are.
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

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        """The budget's limits and the others: all must hold. Raises BudgetError."""
        return (*parse_budget(self.budget).limits, *parse_limits(self.limits))

    @property
    def text(self) -> str:
        """Every limit as it was written, for the plan document."""
        return ",".join((self.budget, *self.limits))

    def as_request(self, metric: str) -> dict[str, Any]:
        """The members of a job request that this question replaces."""
        return {
            "budgets": [self.budget],
            "limits": list(self.limits),
            "pins": dict(self.pins),
            "ties": [list(tie) for tie in self.ties],
            "metrics": [metric],
            "time_limit_seconds": self.time_limit_seconds,
            "gap": self.gap,
            "runtime": self.runtime,
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
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """What a budget came to: `plan` is None when nothing fits or nothing was found in time."""

    solution: Solution
    plan: Plan | None
    result: Mapping[str, Any]

    @property
    def status(self) -> str:
        """optimal, feasible, infeasible or unknown."""
        return str(self.solution.status)


def score_table(
    inventory: Inventory,
    schemes: Sequence[str],
    scores: Iterable[ScoreRow | ScoreRecord],
    metrics: Collection[str],
    latency: Latency | None = None,
    costs: Costs | None = None,
) -> ScoreTable:
    """Layers x schemes with every score and exact resource; NaN where there is no score.

    `costs` brings latency, energy and memory; `latency` is short for a table alone. `schemes` are the menu
    and the schemes that pins name. Scores of other layers, schemes and metrics are passed over. Raises
    CostError when a table lacks a cell.
    """
    found = costs or Costs(latency)
    parsed = [parse_scheme(name) for name in schemes]
    names = tuple(scheme.name for scheme in parsed)
    row = {layer.name: position for position, layer in enumerate(inventory.layers)}
    column = {name: position for position, name in enumerate(names)}
    values = {metric: np.full((len(row), len(column)), np.nan) for metric in metrics}
    stderr = {metric: np.full((len(row), len(column)), np.nan) for metric in metrics}
    for score in scores:
        if score.metric in values and score.layer in row and score.scheme in column:
            cell = row[score.layer], column[score.scheme]
            values[score.metric][cell] = score.value
            stderr[score.metric][cell] = np.nan if score.stderr is None else score.stderr
    return ScoreTable(
        tuple(
            TableLayer(layer.name, layer.parameters, layer.macs, None, layer.role)
            for layer in inventory.layers
        ),
        names,
        {name: MetricTable(SCORERS[name].direction, values[name], stderr[name]) for name in metrics},
        {**resources(inventory.layers, parsed, found.latency, found.energy), **found.resources},
    )


def table_schemes(menu: Sequence[str], pins: Mapping[str, str]) -> tuple[str, ...]:
    """The menu and then the schemes that only pins name, in canonical spelling, each once.

    >>> table_schemes(["w2", "w4-channel"], {"lm_head": "w8", "a": "w2"})
    ('w2', 'w4', 'w8')
    """
    return tuple(dict.fromkeys(parse_scheme(name).name for name in (*menu, *pins.values())))


def missing_scores(
    inputs: PlanningInputs, metric: str, pins: Mapping[str, str] | None = None, runtime: str | None = None
) -> list[tuple[str, str]]:
    """The (layer, scheme) that a plan may choose and that have no score in `metric`; pinned layers need only
    theirs, and what the runtime forbids needs none.
    """
    table, forbidden = inputs.table, forbidden_in(inputs.inventory, inputs.table.schemes, runtime)
    pinned = expand_pins(inputs.inventory, pins or {})
    unscored = table.resources_offered() & np.isnan(table.metrics[metric].values)
    gaps = [(table.layers[i].name, table.schemes[j]) for i, j in np.argwhere(unscored)]
    return [
        (layer, scheme)
        for layer, scheme in gaps
        if scheme in ((pinned[layer],) if layer in pinned else inputs.menu)
        and scheme not in forbidden.get(layer, ())
    ]


def forbidden_in(
    inventory: Inventory, schemes: Sequence[str], runtime: str | None
) -> dict[str, tuple[str, ...]]:
    """Layer -> the schemes that the runtime does not run there; empty without a runtime."""
    if runtime is None:
        return {}
    return forbidden_schemes(inventory.layers, [parse_scheme(name) for name in schemes], RUNTIMES[runtime])


def expand_pins(inventory: Inventory, pins: Mapping[str, str]) -> dict[str, str]:
    """Layer -> canonical scheme: a name of its own wins over patterns, a later pattern over an earlier one.

    Names of shared tensors count for the layer that holds them. Raises PatternError for a pattern that
    matches nothing, SchemeError for a scheme that cannot be read.
    """
    names = list(inventory.by_name)
    found: dict[str, str] = {}
    for pattern, scheme in sorted(pins.items(), key=lambda pin: pin[0] in inventory.by_name):
        for name in select([pattern], names):
            found[inventory.by_name[name].name] = parse_scheme(scheme).name
    return found


def expand_ties(inventory: Inventory, ties: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Each tie as layer names, each once. Raises PatternError for a pattern that matches nothing."""
    names = list(inventory.by_name)
    return tuple(
        tuple(dict.fromkeys(inventory.by_name[name].name for name in select(tie, names))) for tie in ties
    )


def compile_ask(inputs: PlanningInputs, ask: Ask) -> Compiled:
    """The problem of one budget. Raises what `compile_limits` raises, and BudgetError."""
    return compile_limits(inputs, ask, ask.all_limits)


def compile_limits(inputs: PlanningInputs, ask: Ask, limits: Sequence[Limit]) -> Compiled:
    """The problem under `limits` with the pins, ties and metric of `ask`.

    Raises PatternError, CompileError or BudgetError for what the request names and the table lacks,
    RuntimeRefuses when the runtime leaves a layer without a choice, ScoresMissing when a choice has no score.
    """
    pins, ties = expand_pins(inputs.inventory, ask.pins), expand_ties(inputs.inventory, ask.ties)
    if ask.runtime is not None:
        require_choices(inputs.inventory, inputs.menu, pins, RUNTIMES[ask.runtime])
        ties += fused_sets(RUNTIMES[ask.runtime], inputs.table.layer_names)
    metric = ask.metric or next(iter(inputs.table.metrics))
    known = metric in inputs.table.metrics
    gaps = missing_scores(inputs, metric, ask.pins, ask.runtime) if known else []
    if gaps:
        shown = ", ".join(f"{layer} x {scheme}" for layer, scheme in gaps[:3])
        raise ScoresMissing(
            f"Every layer and scheme of the menu must have a score in {metric}. Got none for {shown} "
            f"({len(gaps)} in all). Wait for the job to end; a scheme off its menu needs a new job."
        )
    return compile_problem(
        inputs.table,
        metric=metric,
        limits=limits,
        ties=[tie for tie in ties if len(tie) > 1],
        pins=pins,
        schemes=inputs.menu,
        forbidden=forbidden_in(inputs.inventory, inputs.table.schemes, ask.runtime),
    )


def solve_budget(inputs: PlanningInputs, ask: Ask, *, solver: str = "auto") -> Answer:
    """The best additive plan of one budget with its certificate; infeasible is an answer, not an error.

    Raises what `compile_ask` raises.
    """
    compiled = compile_ask(inputs, ask)
    solution = solve(compiled.problem, solver=solver, gap=ask.gap, time_limit=ask.time_limit_seconds)
    plan = None
    if solution.choice is not None:
        plan = plan_of(inputs, ask, compiled, compiled.assignment(solution.choice), solution=solution)
    return Answer(solution, plan, plan_result(ask, compiled, solution, plan, sources=inputs.sources))


def frontier_of(inputs: PlanningInputs, ask: Ask, resource: str, most: int) -> list[dict[str, Any]]:
    """The supported Pareto-optimal plans over a resource, the smallest first, as JSON with their exact
    resources.

    The limits of `ask` hold, its budget does not. Raises what `compile_limits` raises.
    """
    compiled = compile_limits(inputs, ask, parse_limits(ask.limits))
    points = frontier(compiled, resource, most=most)
    assignments = [compiled.assignment(point.choice) for point in points]
    return [
        {
            "objective": point.objective,
            "resources": numbers(compiled.resources(assignment)),
            "layers": assignment,
        }
        for point, assignment in zip(points, assignments, strict=True)
    ]


def plan_of(
    inputs: PlanningInputs,
    ask: Ask,
    compiled: Compiled,
    assignment: Mapping[str, str],
    *,
    solution: Solution,
    source: str | None = None,
    predicted: float | None = None,
) -> Plan:
    """The plan document of an assignment; `solution` is the certificate that goes with it.

    `source` says how the plan was found (default: "additive METRIC"), `predicted` what the score model
    expects (default: the metric's sum).
    """
    digests = replace(inputs.digests, settings=ask.settings_digest(inputs.menu))
    return build_plan(
        inputs.inventory,
        assignment,
        digests=digests,
        budget=ask.text,
        metric=compiled.metric,
        predicted=compiled.objective(assignment) if predicted is None else predicted,
        certificate=certificate_of(solution),
        source=source or additive(compiled.metric),
        runtime=ask.runtime,
        latency=inputs.sources.get("latency", {}).get("source"),
        calibration=inputs.calibration,
        corrections=inputs.corrections,
    )


def plan_result(
    ask: Ask,
    compiled: Compiled,
    solution: Solution,
    plan: Plan | None,
    candidates: Sequence[Mapping[str, Any]] = (),
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The members of a plan resource that the document does not hold, as JSON."""
    used = {} if plan is None else compiled.resources(plan.assignment)
    return {
        "metric": compiled.metric,
        "objective": _finite(solution.objective),
        "bound": _finite(solution.bound),
        "gap": _finite(solution.gap),
        "source": None if plan is None else plan.source,
        "candidates": [dict(candidate) for candidate in candidates],
        "least_budget": numbers(solution.least_budget),
        "reason": solution.reason,
        "resources": numbers(used),
        "cost_sources": {name: dict(source) for name, source in (sources or {}).items()},
        "solver": solution.solver,
        "seconds": solution.seconds,
        "ask": ask.as_request(compiled.metric),
    }


def certificate_of(solution: Solution) -> Certificate:
    """What was proven; a plan is at least feasible."""
    status = Status.OPTIMAL if solution.status is Status.OPTIMAL else Status.FEASIBLE
    return Certificate(
        str(status), _finite(solution.objective), _finite(solution.bound), _finite(solution.gap)
    )


def additive(metric: str) -> str:
    """The name of the plan that minimizes the sum of one metric."""
    return f"additive {metric}"


def numbers(totals: Mapping[str, Fraction]) -> dict[str, int | float]:
    """Exact totals for JSON."""
    return {name: exact_number(Fraction(value)) for name, value in totals.items()}


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
