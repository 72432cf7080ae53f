"""A score model corrected by measured plans: Bayesian linear regression of what the model missed.

Measured values say how the model must be changed near the plans that were measured: the weight of the
interactions (the mixing weight of gram), one weight per group, the single cells, and the pairs of cells that
changed together. Every one of these has a normal prior around the model as it is, so a handful of
measurements moves what they speak of and leaves the rest. The answer is a model of the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from search.pairwise import Floats, PairwiseModel
from search.problem import Choice

OFFSET, SCALE, MIXING, GROUP, CELL, PAIR = 0.05, 0.25, 1.0, 0.2, 0.1, 0.2
"""Standard deviations before anything is measured: of a constant (of the best value), of the factors of all
scores, of all interactions and of a group's scores (around 1), of a cell's score and of the interaction of
two cells (relative to their scores).
"""
NOISE, FAR = 0.005, 0.15
"""What no such model explains: of the best value, and of a plan's distance from it."""
NEAR = 4
"""Pairs are corrected in plans that differ from the best one in at most so many groups."""

Cell = tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Terms:
    """What may be corrected: for each plan (rows) and term (columns) what one unit of the term adds."""

    design: Floats
    spread: Floats
    cells: tuple[Cell, ...]
    pairs: tuple[tuple[Cell, Cell], ...]


def corrected(model: PairwiseModel, measured: Sequence[tuple[Choice, float]]) -> PairwiseModel:
    """The model as the measurements (choice, value) suggest; in their unit, whatever its own was."""
    if not measured:
        return model
    choices = [choice for choice, _ in measured]
    values = np.array([value for _, value in measured])
    prior = _in_unit_of(model, choices, values)
    best = choices[int(values.argmin())]
    terms = _terms(prior, choices, best, float(np.abs(values).min()))
    found = _posterior(prior, choices, values, terms)
    if found[2] < -1:
        terms.spread[2] = 0.0
        without = PairwiseModel(prior.linear, np.zeros_like(prior.factor))
        found = _posterior(without, choices, values, terms)
        found[2] = -1.0
    return _applied(prior, terms, found)


def _in_unit_of(model: PairwiseModel, choices: Sequence[Choice], values: Floats) -> PairwiseModel:
    """The model times a factor (and shifted, where its values are not all above 0), so that it meets the
    measured values in the middle.
    """
    predicted = np.array([model.value(choice) for choice in choices])
    if predicted.min() > 0 and values.min() > 0:
        factor = float(np.median(values / predicted))
        return PairwiseModel(model.linear * factor, model.factor * factor**0.5)
    spread = float(predicted.std())
    factor = float(values.std()) / spread if spread > 0 else 1.0
    shift = (float(np.median(values)) - factor * float(np.median(predicted))) / len(model.linear)
    return PairwiseModel(model.linear * factor + shift, model.factor * factor**0.5)


def _terms(model: PairwiseModel, choices: Sequence[Choice], best: Choice, unit: float) -> _Terms:
    groups = np.arange(len(best))
    picked = np.array(choices)
    linear = model.linear[groups, picked]
    size = np.abs(linear)
    cells = tuple(sorted({(g, c) for choice in choices for g, c in enumerate(choice)}))
    pairs = tuple(sorted({pair for choice in choices for pair in _changed_pairs(choice, best)}))
    has_cell = np.array([[choice[g] == c for g, c in cells] for choice in choices], dtype=np.float64)
    has_pair = np.array(
        [[choice[g] == c and choice[h] == e for (g, c), (h, e) in pairs] for choice in choices],
        dtype=np.float64,
    ).reshape(len(choices), len(pairs))
    scores = np.array([abs(model.linear[cell]) for cell in cells])
    score_of = dict(zip(cells, scores, strict=True))
    products = np.array([np.sqrt(score_of[one] * score_of[other]) for one, other in pairs])
    mixed = np.array([model.interaction(choice) for choice in choices])
    ones = np.ones((len(choices), 1))
    design = np.hstack([ones, linear.sum(axis=1)[:, None], mixed[:, None], linear, has_cell, has_pair])
    spread = np.concatenate(
        [
            [OFFSET * unit, SCALE, MIXING],
            np.full(size.shape[1], GROUP),
            CELL * scores,
            PAIR * products,
        ]
    )
    return _Terms(design, spread, cells, pairs)


def _changed_pairs(choice: Choice, best: Choice) -> list[tuple[Cell, Cell]]:
    changed = [(g, c) for g, (c, here) in enumerate(zip(choice, best, strict=True)) if c != here]
    return list(combinations(changed, 2)) if len(changed) <= NEAR else []


def _posterior(model: PairwiseModel, choices: Sequence[Choice], values: Floats, terms: _Terms) -> Floats:
    """The mean of the terms after the measurements."""
    missed = values - [model.value(choice) for choice in choices]
    noise = NOISE * float(np.abs(values).min()) + FAR * (values - values.min())
    weighted = terms.design * terms.spread
    covariance = weighted @ weighted.T + np.diag(np.maximum(noise, 1e-300) ** 2)
    scale = np.sqrt(np.diag(covariance))
    solved = np.linalg.lstsq(covariance / np.outer(scale, scale), missed / scale, rcond=1e-12)[0]
    return np.asarray(terms.spread * (weighted.T @ (solved / scale)))


def _applied(model: PairwiseModel, terms: _Terms, found: Floats) -> PairwiseModel:
    groups = len(model.linear)
    offset, scale, mixing = found[:3]
    of_group, rest = found[3 : 3 + groups], found[3 + groups :]
    linear = model.linear * np.maximum(1 + scale + of_group, 0.1)[:, None] + offset / groups
    for cell, value in zip(terms.cells, rest, strict=False):
        linear[cell] += value
    factor = model.factor * np.sqrt(1 + mixing)
    pairs = [(pair, v) for pair, v in zip(terms.pairs, rest[len(terms.cells) :], strict=True) if v]
    return PairwiseModel(linear, np.concatenate([factor, _of_pairs(model, pairs)], axis=2))


def _of_pairs(model: PairwiseModel, pairs: Sequence[tuple[tuple[Cell, Cell], float]]) -> Floats:
    """Shape (groups, schemes, pairs): a direction for each pair, in which only its two cells are not 0."""
    factor = np.zeros((*model.linear.shape, len(pairs)))
    for direction, ((one, other), value) in enumerate(pairs):
        root = np.sqrt(abs(value) / 2)
        factor[(*one, direction)] = root
        factor[(*other, direction)] = np.copysign(root, value)
    return factor
