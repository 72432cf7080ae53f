"""Measured search: keep the best measured candidate, then improve it by moves that are measured too.

One-layer scores are not additive, so the last word has the measured quality of whole plans on the choosing
part of the calibration data. A move (a single change into free room, or a swap of two groups) is proposed
by a predicted model and counts only if it is measured better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from search.compile import Assignment, Compiled, CompileError
from search.moves import Moves, Room, Step, moves_from, promising, room_of
from search.pairwise import PairwiseModel, additive_model
from search.problem import Choice

SWAP_CELLS = 300
LONGEST_LIST = 2000


@dataclass(frozen=True, eq=False)
class Measured:
    """The measured quality of one plan, smaller is better: mean, its standard error, every sample."""

    mean: float
    stderr: float
    per_sample: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Candidate:
    """A plan to consider and where it comes from, such as "additive output_kl" or "uniform w4"."""

    source: str
    assignment: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One measured plan, in the order of measuring; `accepted` says that it became the best so far."""

    source: str
    assignment: Assignment
    predicted: float
    measured: Measured
    accepted: bool


@dataclass(frozen=True, eq=False)
class Refined:
    """The best measured plan. `source` is the candidate it came from, or "local search"."""

    assignment: Assignment
    source: str
    measured: Measured
    trace: tuple[Evaluation, ...]


Measure = Callable[[Sequence[Assignment]], Sequence[Measured]]


def refine(
    compiled: Compiled,
    candidates: Sequence[Candidate],
    measure: Measure,
    *,
    predicted: PairwiseModel | None = None,
    evaluations: int = 40,
    batch: int = 4,
) -> Refined:
    """The best of the candidates, improved by up to `evaluations` measured moves.

    Every candidate must keep all limits, ties and pins. Moves are measured `batch` at a time, in the order
    of the `predicted` model (the additive one by default), so the result does not depend on how many
    workers measure. It is never measured worse than any candidate. Raises CompileError without candidates
    or for one that is not allowed.

    `measure` gets layer -> scheme mappings and returns one Measured for each, in their order.
    """
    model = predicted or additive_model(compiled.problem)
    search = MeasuredSearch(compiled, measure, model)
    search.begin(candidates)
    left = evaluations
    while left > 0:
        proposed = search.proposals()
        improved = False
        while left > 0 and not improved:
            tried = list(islice(proposed, min(batch, left)))
            if not tried:
                return search.result()
            left -= len(tried)
            improved = search.take([("local search", choice) for choice in tried])
    return search.result()


class MeasuredSearch:
    """The best plan so far and everything that has been measured."""

    def __init__(self, compiled: Compiled, measure: Measure, model: PairwiseModel) -> None:
        self._compiled = compiled
        self._measure = measure
        self._model = model
        self._room = room_of(compiled.problem)
        self._seen: set[Choice] = set()
        self._trace: list[Evaluation] = []
        self._best: tuple[Choice, Evaluation] | None = None

    @property
    def room(self) -> Room:
        """What moves and repairs work on."""
        return self._room

    @property
    def measured(self) -> list[tuple[Choice, float]]:
        """Every measured choice with its mean, in the order of measuring."""
        return [(self._compiled.choice(step.assignment), step.measured.mean) for step in self._trace]

    def begin(self, candidates: Sequence[Candidate]) -> None:
        """Measures the candidates. Raises CompileError without any, or for one that is not allowed."""
        self.take([(candidate.source, self.checked(candidate)) for candidate in candidates])
        self._current()

    def checked(self, candidate: Candidate) -> Choice:
        """The choice of a candidate. Raises CompileError for one that breaks a limit, tie or pin."""
        choice = self._compiled.choice(candidate.assignment)
        if not self._compiled.problem.feasible(choice):
            raise CompileError(
                f"A candidate must keep every limit and pin. Got {candidate.source!r}, which does not."
            )
        return choice

    def take(self, plans: Sequence[tuple[str, Choice]]) -> bool:
        """Measures the plans that are new; true if one of them is the best so far."""
        fresh = {choice: source for source, choice in reversed(plans) if choice not in self._seen}
        ordered = [
            (fresh[choice], choice)
            for choice in dict.fromkeys(choice for _, choice in plans)
            if choice in fresh
        ]
        assignments = [self._compiled.assignment(choice) for _, choice in ordered]
        measured = list(self._measure(assignments)) if assignments else []
        if len(measured) != len(assignments):
            raise CompileError(f"Measuring must give {len(assignments)} results. Got {len(measured)}.")
        winner = self._winner([result.mean for result in measured])
        for i, ((source, choice), assignment, result) in enumerate(
            zip(ordered, assignments, measured, strict=True)
        ):
            self._seen.add(choice)
            step = Evaluation(source, assignment, self._model.value(choice), result, i == winner)
            self._trace.append(step)
            if i == winner:
                self._best = (choice, step)
        return winner is not None

    def proposals(self) -> Iterator[Choice]:
        """Unmeasured neighbors of the best plan, the predicted best first."""
        choice, _ = self._current()
        moves = moves_from(self._room, choice)
        for step in _ranked(self._room, moves, self._model):
            neighbor = moves.apply(step)
            if neighbor not in self._seen:
                yield neighbor

    def result(self) -> Refined:
        """The best measured plan with everything that was measured."""
        _, best = self._current()
        return Refined(best.assignment, best.source, best.measured, tuple(self._trace))

    def _winner(self, means: Sequence[float]) -> int | None:
        if not means or not np.isfinite(means).all():
            if means:
                raise CompileError("Measured quality must be finite. Got NaN or infinity.")
            return None
        lowest = int(np.argmin(means))
        better = self._best is None or means[lowest] < self._best[1].measured.mean
        return lowest if better else None

    def _current(self) -> tuple[Choice, Evaluation]:
        if self._best is None:
            raise CompileError("Refinement must have at least one candidate. Got none.")
        return self._best


def _ranked(room: Room, moves: Moves, model: PairwiseModel) -> list[Step]:
    """Steps that keep the limits and use the room: predicted gains, single upgrades and swaps, best first."""
    slack = room.slack(moves.choice)
    singles = model.singles(moves)
    grows = np.zeros(len(singles), dtype=bool)
    for change in moves.usage:
        grows |= np.asarray(change > 0, dtype=bool)
    single = np.flatnonzero(moves.singles_fit(slack) & (grows | (singles < 0)))
    cells = promising(singles, SWAP_CELLS)
    pairs = model.pairs(moves, cells, singles)
    first, second = np.nonzero(np.triu(moves.pairs_fit(cells, slack) & _trades(moves, cells)))
    steps: list[Step] = [(int(i),) for i in single]
    steps += [(int(cells[i]), int(cells[j])) for i, j in zip(first, second, strict=True)]
    gains = np.concatenate([singles[single], pairs[first, second]])
    return [steps[int(i)] for i in np.argsort(gains, kind="stable")[:LONGEST_LIST]]


def _trades(moves: Moves, cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pairs in which one change frees what the other uses, in at least one row (any pair without rows)."""
    trades = np.full((len(cells), len(cells)), not moves.usage)
    for change in moves.usage:
        signs = np.sign(change[cells].astype(object)).astype(np.int64)
        trades |= signs[:, None] * signs[None, :] < 0
    return trades
