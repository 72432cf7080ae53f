"""The measured searches by name: how a plan is chosen among candidates and what is tried beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from search.black_box import black_box
from search.compile import Compiled
from search.multi_objective import motpe, nsga2
from search.pairwise import PairwiseModel
from search.refine import Candidate, Measure, Refined, refine


class Choose(Protocol):
    """See `search.refine.refine`, whose arguments and errors are those of every chooser."""

    def __call__(
        self,
        compiled: Compiled,
        candidates: Sequence[Candidate],
        measure: Measure,
        *,
        predicted: PairwiseModel | None = None,
        evaluations: int = 40,
        seed: int = 0,
    ) -> Refined:
        """The best measured plan."""


@dataclass(frozen=True)
class Chooser:
    """One measured search: what it does and how to call it."""

    name: str
    summary: str
    choose: Choose


CHOOSERS: dict[str, Chooser] = {
    "local_search": Chooser(
        "local_search",
        "Single changes, swaps and three-way moves, screened by the score model as measurements correct it.",
        refine,
    ),
    "nsga2": Chooser(
        "nsga2",
        "Optuna's NSGA-II over measured losses and limited resources, with their Pareto set; trusts no score"
        " model.",
        nsga2,
    ),
    "motpe": Chooser(
        "motpe",
        "The same objectives and Pareto set by Optuna's Parzen estimator; trusts no score model.",
        motpe,
    ),
    "black_box": Chooser(
        "black_box", "Optuna's Parzen estimator over whole plans; trusts no score model.", black_box
    ),
}
