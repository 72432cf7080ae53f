"""Optuna's NSGA-II over whole plans: the measured loss and what the limits' resources use, all at once.

Cheaper plans survive beside better ones, so crossing them reaches what a search by the loss alone passes over
(Deb et al. 2002; EQ-Net and APQ search bit widths so). Like `search.black_box` it starts from the measured
candidates, the exact ones among them, and repairs suggestions that break a limit before they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from search.black_box import Suggestions, search_with
from search.compile import Compiled
from search.pairwise import PairwiseModel
from search.problem import Choice
from search.refine import Candidate, Measure, MeasuredSearch, Refined

if TYPE_CHECKING:
    from optuna import Study

SOURCE = "nsga2"
POPULATION = 12


def nsga2(
    compiled: Compiled,
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    predicted: PairwiseModel | None = None,
    evaluations: int = 40,
    batch: int = 4,
    seed: int = 0,
) -> Refined:
    """The best of the candidates and of up to `evaluations` plans of NSGA-II's generations.

    Takes and raises what `search.refine.refine` does. The same seed and measurements give the same answer.
    """

    def suggestions(search: MeasuredSearch) -> Suggestions:
        return _Generations(compiled, search, seed, _study(compiled, seed))

    return search_with(suggestions, SOURCE, compiled, candidates, measure, predicted, evaluations, batch)


class _Generations(Suggestions):
    """Suggestions of a study whose sampler must have asked for a trial itself to count it."""

    def told(self, choice: Choice, mean: float) -> None:
        """A trial with the loss and every limited total."""
        self.study.enqueue_trial(dict(zip(self.space, choice, strict=True)))
        trial = self.study.ask(self.space)
        _ = trial.relative_params  # asks the sampler, which notes the trial's generation
        self.study.tell(trial, [mean, *(float(row.total(choice)) for row in self.compiled.problem.rows)])


def _study(compiled: Compiled, seed: int) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    sides = {"<=": minimize, ">=": maximize}
    directions = [minimize, *(sides[row.relation] for row in compiled.problem.rows)]
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    return optuna.create_study(sampler=sampler, directions=directions)
