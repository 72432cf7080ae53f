"""Optuna's tree-structured Parzen estimator over whole plans, in place of the local search.

It starts from the measured candidates and trusts no score model, so it can leave the neighborhood of the
additive optimum; it needs more evaluations for that (Bergstra et al. 2011; Akiba et al. 2019). Suggestions
that break a limit are repaired before they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from search.compile import Compiled
from search.deadline import Deadline
from search.pairwise import PairwiseModel, additive_model
from search.polish import repair
from search.problem import Choice
from search.refine import Candidate, Measure, MeasuredSearch, Refined

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

SOURCE = "black box"
ASKS_PER_PLAN = 10


def black_box(
    compiled: Compiled,
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    predicted: PairwiseModel | None = None,
    evaluations: int = 40,
    batch: int = 4,
    seed: int = 0,
) -> Refined:
    """The best of the candidates and of up to `evaluations` plans that Optuna suggests.

    Takes and raises what `search.refine.refine` does. The same seed and measurements give the same answer.
    """

    def suggestions(search: MeasuredSearch) -> Suggestions:
        return Suggestions(compiled, search, seed, _study(seed))

    return search_with(suggestions, SOURCE, compiled, candidates, measure, predicted, evaluations, batch)


def search_with(
    suggestions: Callable[[MeasuredSearch], Suggestions],
    source: str,
    compiled: Compiled,
    candidates: Sequence[Candidate],
    measure: Measure,
    predicted: PairwiseModel | None,
    evaluations: int,
    batch: int,
) -> Refined:
    """The best of the candidates and of up to `evaluations` suggested plans."""
    search = MeasuredSearch(compiled, measure, predicted or additive_model(compiled.problem))
    search.begin(candidates)
    suggest = suggestions(search)
    left = evaluations
    while left > 0:
        tried = suggest.next(min(batch, left))
        if not tried:
            break
        left -= len(tried)
        search.take([(source, choice) for choice in tried])
    return search.result()


class Suggestions:
    """Asks Optuna for new plans, after telling it everything that was measured."""

    def __init__(self, compiled: Compiled, search: MeasuredSearch, seed: int, study: Study) -> None:
        self._search, self._told = search, 0
        self.compiled, self.study, self.space = compiled, study, _space(compiled)
        self._offered = compiled.problem.offered
        self._prices = np.where(self._offered, np.nan_to_num(compiled.problem.costs), np.inf)
        self._random = np.random.default_rng(seed)

    def next(self, count: int) -> list[Choice]:
        """Up to `count` feasible plans that were not measured yet."""
        self._tell()
        seen = {choice for choice, _ in self._search.measured}
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

    def _ask(self) -> Choice | None:
        from optuna.trial import TrialState

        trial = self.study.ask(self.space)
        self.study.tell(trial, state=TrialState.FAIL)
        return self._repaired([int(trial.params[name]) for name in self.space])

    def _repaired(self, wanted: list[int]) -> Choice | None:
        return repair(self._search.room, tuple(wanted), self._prices, Deadline.after(None))

    def _nearby(self, choice: Choice) -> Choice | None:
        """The choice with one group drawn anew: Optuna repeats itself once it is sure."""
        wanted = list(choice)
        group = int(self._random.integers(len(wanted)))
        wanted[group] = int(self._random.choice(np.flatnonzero(self._offered[group])))
        return self._repaired(wanted)

    def told(self, choice: Choice, mean: float) -> None:
        """Tells the study of one measured plan."""
        from optuna.trial import create_trial

        params = dict(zip(self.space, choice, strict=True))
        self.study.add_trial(create_trial(params=params, distributions=self.space, value=mean))

    def _tell(self) -> None:
        measured = self._search.measured
        for choice, mean in measured[self._told :]:
            self.told(choice, mean)
        self._told = len(measured)


def _study(seed: int) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=1))


def _space(compiled: Compiled) -> dict[str, BaseDistribution]:
    """One categorical parameter per group: the columns of its offered schemes."""
    from optuna.distributions import CategoricalDistribution

    offered = compiled.problem.offered
    return {
        f"{position}": CategoricalDistribution([int(column) for column in np.flatnonzero(row)])
        for position, row in enumerate(offered)
    }
