"""Everything that predicts how good a plan is: sums of stored metrics, and quadratic models of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from search.compile import Assignment, Compiled
from search.pairwise import pairwise_model
from service.planning.ask import Ask
from service.planning.inputs import PlanningInputs
from service.planning.question import compile_ask
from service.runner.rivals import MIXTURES, Factor

DIAGONAL = "output_kl"
"""What mixtures have on the diagonal: the metric in the unit of the interactions with the least bias."""


@dataclass(frozen=True)
class Predictor:
    """A named prediction, smaller is better. `metrics` are what it was made of, `weight` that of the
    interactions, 0 for a sum.
    """

    name: str
    metrics: tuple[str, ...]
    weight: float
    value: Callable[[Assignment], float]


def predictors(inputs: PlanningInputs, ask: Ask, factors: Mapping[str, Factor]) -> tuple[Predictor, ...]:
    """One per metric of the table; for each metric with interactions (`factors`) the quadratic model of its
    own, and mixtures with output_kl where that is stored.
    """
    compared = () if inputs.deciding is None else inputs.deciding.compared(next(iter(inputs.table.metrics)))
    named = [name for name in inputs.table.metrics if name not in compared]
    compiled = {name: compile_ask(inputs, replace(ask, metric=name)) for name in named}
    sums = (_sum(found) for found in compiled.values())
    return (*sums, *_quadratic(compiled, factors))


def _sum(compiled: Compiled) -> Predictor:
    sign = 1.0 if compiled.problem.direction == "min" else -1.0
    name = compiled.metric
    return Predictor(name, (name,), 0.0, lambda plan: sign * compiled.objective(plan))


def _quadratic(compiled: Mapping[str, Compiled], factors: Mapping[str, Factor]) -> Iterator[Predictor]:
    for metric, factor in factors.items():
        yield _pairs(f"{metric}, quadratic", compiled[metric], metric, factor, 1.0)
        if DIAGONAL in compiled:
            for weight in MIXTURES:
                name = f"{DIAGONAL} + {weight:g} {metric}"
                yield _pairs(name, compiled[DIAGONAL], metric, factor, weight)


def _pairs(name: str, base: Compiled, metric: str, factor: Factor, weight: float) -> Predictor:
    model = pairwise_model(base, factor, weight)
    made_of = tuple(dict.fromkeys((base.metric, metric)))
    return Predictor(name, made_of, weight, lambda plan: model.value(base.choice(plan)))
