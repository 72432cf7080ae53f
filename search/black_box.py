"""Optuna's samplers over whole plans, in place of the local search.

They start from the measured candidates, the exact ones among them, and trust no score model, so they can
leave the neighborhood of the additive optimum; they need more evaluations for that (Bergstra et al. 2011;
Akiba et al. 2019). Suggestions that break a limit are repaired before they are measured. The measurements
are the trials: a seeded search that is begun again makes the same suggestions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from search.budget import BITS_PER_WEIGHT
from search.compile import Compiled
from search.deadline import Deadline
from search.pairwise import PairwiseModel, additive_model
from search.polish import repair
from search.problem import Choice, Row
from search.refine import Candidate, Evaluation, Measure, Measured, MeasuredSearch, Refined

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Direction = Literal["minimize", "maximize"]
ASKS_PER_PLAN = 10
LOSS = "loss"
MOST_PARTS = 4
"""Of a loss that are objectives; where there are more, nearly every plan is the best in one of them."""


@dataclass(frozen=True)
class BlackBox:
    """A measured search by one of Optuna's samplers, which `sampler` makes from a seed; `source` names the
    plans it finds. With `several` objectives (see Objectives) the answer has the Pareto set of all that was
    measured; the plan is the one of the least loss in any case.
    """

    source: str
    sampler: Callable[[int], BaseSampler]
    several: bool = False

    def __call__(
        self,
        compiled: Compiled,
        candidates: Sequence[Candidate],
        measure: Measure,
        *,
        predicted: PairwiseModel | None = None,
        evaluations: int = 40,
        batch: int = 4,
        seed: int = 0,
    ) -> Refined:
        """The best of the candidates and of up to `evaluations` plans that the sampler suggests.

        Takes and raises what `search.refine.refine` does. The same seed and measurements give the same
        answer.
        """
        search = MeasuredSearch(compiled, measure, predicted or additive_model(compiled.problem))
        search.begin(candidates)
        suggestions = Suggestions(compiled, search, self, seed)
        left = evaluations
        while left > 0:
            tried = suggestions.next(min(batch, left))
            if not tried:
                break
            left -= len(tried)
            search.take([(self.source, choice) for choice in tried])
        found = search.result()
        return replace(found, pareto=suggestions.best()) if self.several else found


class Objectives:
    """What trials are judged by: the measured loss; with `several` objectives, where the loss is made of a
    few others, each of those, and the total of every resource that is limited from one side.
    """

    def __init__(self, compiled: Compiled, measured: Measured, *, several: bool) -> None:
        self._rows = _limited(compiled) if several else ()
        self._parts = tuple(measured.parts) if several and len(measured.parts) <= MOST_PARTS else ()
        self.names = (*(self._parts or (LOSS,)), *(row.resource for row in self._rows))

    @property
    def directions(self) -> list[Direction]:
        """Of each objective, as Optuna calls it."""
        losses: list[Direction] = ["minimize"] * (len(self.names) - len(self._rows))
        return [*losses, *("minimize" if row.relation == "<=" else "maximize" for row in self._rows)]

    def values(self, choice: Choice, measured: Measured) -> list[float]:
        """The objectives of a measured choice, in their own units."""
        losses = [measured.parts[name] for name in self._parts] or [measured.mean]
        return [*losses, *(float(row.total(choice) * row.unit) for row in self._rows)]


class Suggestions:
    """Asks Optuna for new plans, after telling it everything that was measured."""

    def __init__(self, compiled: Compiled, search: MeasuredSearch, how: BlackBox, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = next(iter(search.evaluated.values()))
        self._objectives = Objectives(compiled, first.measured, several=how.several)
        self._study = optuna.create_study(sampler=how.sampler(seed), directions=self._objectives.directions)
        self._search, self._told = search, 0
        self._space = _space(compiled)
        self._offered = compiled.problem.offered
        self._prices = np.where(self._offered, np.nan_to_num(compiled.problem.costs), np.inf)
        self._random = np.random.default_rng(seed)

    def next(self, count: int) -> list[Choice]:
        """Up to `count` feasible plans that were not measured yet."""
        self._tell()
        seen = set(self._search.evaluated)
        found: list[Choice] = []
        for _ in range(ASKS_PER_PLAN * count):
            choice = self._ask()
            if choice in seen and choice is not None:
                choice = self._nearby(choice)
            if choice is not None and choice not in seen:
                seen.add(choice)
                found.append(choice)
            if len(found) == count:
                break
        return found

    def best(self) -> tuple[Evaluation, ...]:
        """The measured plans that no other one beats in every objective, the least loss first."""
        self._tell()
        found = []
        for trial in self._study.best_trials:
            objectives = dict(zip(self._objectives.names, trial.values, strict=True))
            found.append(replace(self._search.evaluated[self._choice(trial.params)], objectives=objectives))
        return tuple(sorted(found, key=lambda one: one.measured.mean))

    def _ask(self) -> Choice | None:
        from optuna.trial import TrialState

        trial = self._study.ask(self._space)
        self._study.tell(trial, state=TrialState.FAIL)
        return self._repaired(self._choice(trial.params))

    def _choice(self, params: dict[str, int]) -> Choice:
        return tuple(int(params[name]) for name in self._space)

    def _repaired(self, wanted: Choice) -> Choice | None:
        return repair(self._search.room, wanted, self._prices, Deadline.after(None))

    def _nearby(self, choice: Choice) -> Choice | None:
        """The choice with one group drawn anew: Optuna repeats itself once it is sure."""
        wanted = list(choice)
        group = int(self._random.integers(len(wanted)))
        wanted[group] = int(self._random.choice(np.flatnonzero(self._offered[group])))
        return self._repaired(tuple(wanted))

    def _tell(self) -> None:
        """Tells the study what was measured since; a sampler must ask for a trial itself to count it."""
        evaluated = list(self._search.evaluated.items())
        for choice, one in evaluated[self._told :]:
            self._study.enqueue_trial(dict(zip(self._space, choice, strict=True)))
            trial = self._study.ask(self._space)
            _ = trial.relative_params  # asks the sampler, which notes the trial's generation
            self._study.tell(trial, self._objectives.values(choice, one.measured))
        self._told = len(evaluated)


def _limited(compiled: Compiled) -> tuple[Row, ...]:
    """The rows of whole resources; one that is limited from both sides has no better direction."""
    whole = {*compiled.table.resources, BITS_PER_WEIGHT}
    rows = [row for row in compiled.problem.rows if row.resource in whole]
    sides = [row.resource for row in rows]
    return tuple(row for row in rows if sides.count(row.resource) == 1)


def _space(compiled: Compiled) -> dict[str, BaseDistribution]:
    """One categorical parameter per group: the columns of its offered schemes."""
    from optuna.distributions import CategoricalDistribution

    offered = compiled.problem.offered
    return {
        f"{position}": CategoricalDistribution([int(column) for column in np.flatnonzero(row)])
        for position, row in enumerate(offered)
    }


def _parzen(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed, n_startup_trials=1)


black_box = BlackBox("black box", _parzen)
