"""Measured search: keep the best measured candidate, then improve it by moves that are measured too.

One-layer scores are not additive, so the last word has the measured quality of whole plans on the choosing
part of the calibration data. Every round corrects the score model by all that was measured
(search/correction.py), solves the budget again with it, and proposes the plan it finds and the moves around
the best plan (a single change into free room, a swap of two groups, a three-way move) that it predicts to be
best. A plan counts only if it is measured clearly better, and not worse on either half of the choosing part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from search.compile import Assignment, Compiled, CompileError
from search.correction import corrected
from search.moves import SWAP_CELLS, TRIPLE_CELLS, Moves, Room, Step, moves_from, room_of, worthwhile
from search.pairwise import Floats, PairwiseModel, additive_model
from search.problem import Choice
from search.solvers.quadratic import solve_quadratic

LONGEST_LIST = 2000
RESTARTS = 4
PATIENCE = 16
"""So many measured plans in a row that do not count end the search."""
LEARNING = 8
"""So many moves are measured before predictions are believed that none is worth it."""
HOPE = 3.0
"""After that, those whose predicted loss is at most so many times the error of predictions."""
CLEAR = 2.0
"""A plan counts that is better by so many standard errors: among dozens, some look better by chance."""
CORRECTED = "corrected model"
LOCAL = "local search"


@dataclass(frozen=True, eq=False)
class Measured:
    """The measured quality of one plan, smaller is better: mean, its standard error, every sample.

    `halves` are the means of two halves of the samples, the same two for every plan; () where there are none.
    `parts` are the losses that the mean is made of, by name, where there are several.
    """

    mean: float
    stderr: float
    per_sample: Floats = field(default_factory=lambda: np.zeros(0))
    halves: tuple[float, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)

    def counts_against(self, other: Measured) -> bool:
        """Whether it is clearly better than the other one, by CLEAR standard errors of the difference over
        paired samples (where there are such), and on neither half worse.
        """
        hurts = any(mine > theirs for mine, theirs in zip(self.halves, other.halves, strict=False))
        return not hurts and other.mean - self.mean > CLEAR * self._error_of_difference(other)

    def _error_of_difference(self, other: Measured) -> float:
        if len(self.per_sample) != len(other.per_sample) or len(self.per_sample) < 2:
            return 0.0
        difference = self.per_sample - other.per_sample
        return float(difference.std(ddof=1) / len(difference) ** 0.5)


@dataclass(frozen=True)
class Candidate:
    """A plan to consider and where it comes from, such as "additive output_kl" or "uniform w4".

    A `rival` is what a plan must be better than: it wins by any measured difference, others only clearly.
    """

    source: str
    assignment: Mapping[str, str]
    rival: bool = False


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One measured plan, in the order of measuring; `accepted` says that it became the best so far. In a
    Pareto set `objectives` are what no other plan has all better.
    """

    source: str
    assignment: Assignment
    predicted: float
    measured: Measured
    accepted: bool
    objectives: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Refined:
    """The best measured plan. `source` is the candidate it came from, "corrected model" or "local search".
    `pareto` are, where several objectives were searched, the measured plans that none beats in all of them.
    """

    assignment: Assignment
    source: str
    measured: Measured
    trace: tuple[Evaluation, ...]
    pareto: tuple[Evaluation, ...] = ()


Measure = Callable[[Sequence[Assignment]], Sequence[Measured]]


def refine(
    compiled: Compiled,
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    predicted: PairwiseModel | None = None,
    evaluations: int = 40,
    batch: int = 4,
    patience: int = PATIENCE,
    seed: int = 0,
) -> Refined:
    """The best of the candidates, improved by up to `evaluations` measured plans.

    Every candidate must keep all limits, ties and pins. Plans are measured `batch` at a time, in the order
    of the `predicted` model (the additive one by default) as the measurements correct it, so the result does
    not depend on how many workers measure. It is never measured worse than the first candidate or a rival.
    Ends early when `patience` plans in a row did not count, or when no move is predicted to be worth it. The
    same `seed`, of the corrected model's restarts, and measurements give the same answer.
    Raises CompileError without candidates, for one that is not allowed, and for fused layers in the table.

    `measure` gets layer -> scheme mappings and returns one Measured for each, in their order.
    """
    search = MeasuredSearch(compiled, measure, predicted or additive_model(compiled.problem))
    search.begin(candidates)
    left, fruitless = evaluations, 0
    while left > 0 and fruitless < patience:
        search.correct()
        tried = list(islice(search.proposals(seed), min(batch, left)))
        if not tried:
            break
        left -= len(tried)
        fruitless = 0 if search.take(tried) else fruitless + len(tried)
    return search.result()


class MeasuredSearch:
    """The best plan so far and everything that has been measured."""

    def __init__(self, compiled: Compiled, measure: Measure, model: PairwiseModel) -> None:
        compiled.refuse_fused("A measured search")
        self._compiled = compiled
        self._measure = measure
        self._prior = self._model = model
        self._room = room_of(compiled.problem)
        self._choices: dict[Choice, Evaluation] = {}
        self._errors: list[float] = []
        self._best: tuple[Choice, Evaluation] | None = None

    @property
    def room(self) -> Room:
        """What moves and repairs work on."""
        return self._room

    @property
    def evaluated(self) -> Mapping[Choice, Evaluation]:
        """Every measured choice, in the order of measuring."""
        return self._choices

    @property
    def measured(self) -> list[tuple[Choice, float]]:
        """Every measured choice with its mean, in the order of measuring."""
        return [(choice, step.measured.mean) for choice, step in self._choices.items()]

    def begin(self, candidates: Sequence[Candidate]) -> None:
        """Measures the candidates. The first one counts, then the best of those that are clearly better, then
        the best rival if it is better at all. Raises CompileError without any or for one that breaks a limit.
        """
        named = [(candidate.source, self.checked(candidate)) for candidate in candidates]
        rivals = {choice for (_, choice), one in zip(named, candidates, strict=True) if one.rival}
        models = [choice for _, choice in named if choice not in rivals]
        self._record(named)
        self._accept([named[0][1]] if named else [], lambda measured: True)
        _, first = self._current()
        self._accept(models, lambda measured: measured.counts_against(first.measured))
        self._accept([choice for choice in self._choices if choice in rivals], lambda measured: True)

    def checked(self, candidate: Candidate) -> Choice:
        """The choice of a candidate. Raises CompileError for one that breaks a limit, tie or pin."""
        choice = self._compiled.choice(candidate.assignment)
        if not self._compiled.problem.feasible(choice):
            raise CompileError(
                f"A candidate must keep every limit and pin. Got {candidate.source!r}, which does not."
            )
        return choice

    def take(self, plans: Sequence[tuple[str, Choice]]) -> bool:
        """Measures the plans that are new; true if one of them counts: it is clearly better than the best so
        far, and not worse on either half of the samples.
        """
        _, best = self._current()
        fresh = self._record(plans)
        return self._accept(fresh, lambda measured: measured.counts_against(best.measured))

    def correct(self) -> None:
        """Correct the score model by everything that was measured."""
        self._model = corrected(self._prior, self.measured)

    def proposals(self, seed: int = 0) -> Iterator[tuple[str, Choice]]:
        """Plans that were not measured and that the model, once corrected, thinks worth it, each with its
        source: the plan it likes best of all, the neighbor of the best plan that it likes best, then the
        neighbors that keep the budget full, the predicted best first.
        """
        choice, _ = self._current()
        again = solve_quadratic(
            self._compiled.problem, self._model, [choice], restarts=RESTARTS, seed=seed
        ).choice
        if again not in self._choices:
            yield CORRECTED, again
        known = {*self._choices, again}
        anywhere = list(islice(self._neighbors(choice, known, filling=False), 1))
        yield from ((LOCAL, neighbor) for neighbor in anywhere)
        filling = self._neighbors(choice, known.union(anywhere), filling=True)
        yield from ((LOCAL, neighbor) for neighbor in filling)

    def _neighbors(self, choice: Choice, known: Set[Choice], *, filling: bool) -> Iterator[Choice]:
        """Plans one move away that are not known, the predicted best first, while there is hope."""
        moves, hope = moves_from(self._room, choice), self._hope()
        for step, gain in _ranked(self._room, moves, self._model, filling=filling):
            if gain > hope:
                return
            neighbor = moves.apply(step)
            if neighbor not in known:
                yield neighbor

    def result(self) -> Refined:
        """The best measured plan with everything that was measured."""
        _, best = self._current()
        return Refined(best.assignment, best.source, best.measured, tuple(self._choices.values()))

    def _record(self, plans: Sequence[tuple[str, Choice]]) -> list[Choice]:
        """Measures the plans that are new."""
        fresh: dict[Choice, str] = {}
        for source, choice in plans:
            if choice not in self._choices:
                fresh.setdefault(choice, source)
        assignments = [self._compiled.assignment(choice) for choice in fresh]
        found = list(self._measure(assignments)) if assignments else []
        if len(found) != len(assignments):
            raise CompileError(f"Measuring must give {len(assignments)} results. Got {len(found)}.")
        if not all(np.isfinite(result.mean) for result in found):
            raise CompileError("Measured quality must be finite. Got NaN or infinity.")
        for (choice, source), plan, result in zip(fresh.items(), assignments, found, strict=True):
            predicted = self._model.value(choice)
            self._choices[choice] = Evaluation(source, plan, predicted, result, accepted=False)
            if source == LOCAL:
                self._errors.append(predicted - result.mean)
        return list(fresh)

    def _accept(self, choices: Sequence[Choice], counts: Callable[[Measured], bool]) -> bool:
        """Makes the best of these plans that counts the best so far, if it is better; true if so."""
        bound = np.inf if self._best is None else self._best[1].measured.mean
        means = {choice: self._choices[choice].measured.mean for choice in choices}
        better = [c for c, mean in means.items() if mean < bound and counts(self._choices[c].measured)]
        if not better:
            return False
        choice = min(better, key=lambda one: means[one])
        step = replace(self._choices[choice], accepted=True)
        self._choices[choice] = step
        self._best = (choice, step)
        return True

    def _hope(self) -> float:
        """Moves that are predicted to lose more than this are not measured."""
        if len(self._errors) < LEARNING:
            return np.inf
        return HOPE * float(np.sqrt(np.mean(np.square(self._errors))))

    def _current(self) -> tuple[Choice, Evaluation]:
        if self._best is None:
            raise CompileError("Refinement must have at least one candidate. Got none.")
        return self._best


def _ranked(room: Room, moves: Moves, model: PairwiseModel, *, filling: bool) -> list[tuple[Step, float]]:
    """Single changes, swaps and three-way moves that keep the limits, with their predicted gains, best first.

    `filling` keeps those from which the model learns most: single changes that use room or gain, swaps that
    trade room, and the three-way moves with a trade that gain; the others would crowd out the swaps.
    """
    slack = room.slack(moves.choice)
    singles = model.singles(moves)
    parts = [
        _singles(moves, singles, slack, filling=filling),
        _pairs(moves, model, singles, slack, filling=filling),
        _triples(moves, model, singles, slack, filling=filling),
    ]
    steps = [step for found, _ in parts for step in found]
    gains = np.concatenate([gains for _, gains in parts])
    return [(steps[i], float(gains[i])) for i in np.argsort(gains, kind="stable")[:LONGEST_LIST].tolist()]


Ranked = tuple[list[Step], Floats]


def _singles(moves: Moves, singles: Floats, slack: Sequence[int], *, filling: bool) -> Ranked:
    kept = moves.singles_fit(slack)
    if filling:
        grows = np.zeros(len(singles), dtype=bool)
        for change in moves.usage:
            grows |= np.asarray(change > 0, dtype=bool)
        kept &= grows | (singles < 0)
    found = np.flatnonzero(kept)
    return [(int(i),) for i in found], singles[found]


def _pairs(
    moves: Moves, model: PairwiseModel, singles: Floats, slack: Sequence[int], *, filling: bool
) -> Ranked:
    cells = worthwhile(moves, singles, SWAP_CELLS)
    gains, kept = model.pairs(moves, cells, singles), moves.pairs_fit(cells, slack)
    if filling:
        kept &= _trades(moves, cells)
    first, second = np.nonzero(np.triu(kept))
    steps: list[Step] = [(int(cells[i]), int(cells[j])) for i, j in zip(first, second, strict=True)]
    return steps, gains[first, second]


def _triples(
    moves: Moves, model: PairwiseModel, singles: Floats, slack: Sequence[int], *, filling: bool
) -> Ranked:
    cells = worthwhile(moves, singles, TRIPLE_CELLS)
    found, single = moves.triples(cells, slack), singles[cells]
    one, two, three = found.T
    pairs = model.pairs(moves, cells, singles)
    gains = pairs[one, two] + pairs[one, three] + pairs[two, three] - single[found].sum(axis=1)
    if filling:
        trades = _trades(moves, cells)
        kept = (trades[one, two] | trades[one, three] | trades[two, three]) & (gains < 0)
        found, gains = found[kept], gains[kept]
    best = np.argsort(gains, kind="stable")[:LONGEST_LIST]
    steps: list[Step] = [tuple(row) for row in cells[found[best]].tolist()]
    return steps, gains[best]


def _trades(moves: Moves, cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pairs in which one change frees what the other uses, in at least one row (any pair without rows)."""
    trades = np.full((len(cells), len(cells)), not moves.usage)
    for change in moves.usage:
        signs = np.sign(change[cells].astype(object)).astype(np.int64)
        trades |= signs[:, None] * signs[None, :] < 0
    return trades
