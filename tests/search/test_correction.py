from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from search.correction import corrected
from search.pairwise import PairwiseModel

GROUPS, SCHEMES = 6, 3
Choices = list[tuple[int, ...]]


def _model(seed: int) -> PairwiseModel:
    rng = np.random.default_rng(seed)
    linear = 10 ** rng.uniform(-2, 0, (GROUPS, 1)) * np.array([1.0, 0.3, 0.1])
    common = rng.normal(size=(1, 1, 3))
    return PairwiseModel(linear, np.sqrt(linear)[:, :, None] * (0.4 * common + 0.2 * rng.normal(size=3)))


def _some(count: int, seed: int) -> Choices:
    rng = np.random.default_rng(seed)
    every = list(product(range(SCHEMES), repeat=GROUPS))
    return [every[i] for i in rng.permutation(len(every))[:count]]


def _error(model: PairwiseModel, truth: PairwiseModel, choices: Choices) -> float:
    return float(np.mean([abs(model.value(c) / truth.value(c) - 1) for c in choices]))


@pytest.mark.parametrize("mixing", [0.0, 0.25, 2.0])
def test_the_mixing_weight_is_fitted(mixing: float) -> None:
    model = _model(0)
    truth = PairwiseModel(model.linear, model.factor * mixing**0.5)
    seen, unseen = _some(12, 1), _some(60, 2)
    found = corrected(model, [(choice, truth.value(choice)) for choice in seen])
    assert _error(model, truth, unseen) > 0.1
    assert _error(found, truth, unseen) < 0.25 * _error(model, truth, unseen)


def test_the_weights_of_groups_are_fitted() -> None:
    model = _model(3)
    weights = np.random.default_rng(4).uniform(0.6, 1.5, (GROUPS, 1))
    truth = PairwiseModel(model.linear * weights, model.factor)
    found = corrected(model, [(choice, truth.value(choice)) for choice in _some(30, 5)])
    unseen = _some(100, 6)
    assert _error(found, truth, unseen) < 0.5 * _error(model, truth, unseen)


def test_a_pair_near_the_best_plan_is_learned() -> None:
    """Two changes each measured alone and together: what they add together is not their sum."""
    model = PairwiseModel(np.tile([0.1, 0.2, 0.3], (GROUPS, 1)), np.zeros((GROUPS, SCHEMES, 0)))
    base, one, two, both = (0,) * 6, (1, *(0,) * 5), (0, 1, *(0,) * 4), (1, 1, *(0,) * 4)
    measured = [(choice, model.value(choice)) for choice in (base, one, two)]
    measured.append((both, model.value(both) + 0.05))
    found = corrected(model, measured)
    third = (1, 1, 1, 0, 0, 0)
    together, alone = found.value(third) - found.value(two), found.value(one) - found.value(base)
    assert together - alone > 0.02
    assert found.value(both) > model.value(both) + 0.02


def test_measured_plans_are_met_and_little_else_moves() -> None:
    model = _model(7)
    choice = _some(1, 8)[0]
    assert corrected(model, []) is model
    same = corrected(model, [(choice, model.value(choice))])
    np.testing.assert_allclose(same.linear, model.linear, rtol=1e-9)
    raised = corrected(model, [(c, 1.1 * model.value(c)) for c in _some(20, 9)])
    assert all(raised.value(c) == pytest.approx(1.1 * model.value(c), rel=0.02) for c in _some(20, 10))


def test_other_units_are_brought_to_the_measured_one() -> None:
    """A metric to maximize, such as SQNR, stands in the model as values below 0."""
    model = _model(11)
    other = PairwiseModel(1000 * model.linear - 500, np.zeros((GROUPS, SCHEMES, 0)))
    additive = PairwiseModel(model.linear, np.zeros((GROUPS, SCHEMES, 0)))
    found = corrected(other, [(c, additive.value(c)) for c in _some(20, 12)])
    unseen = _some(60, 13)
    ranks = [np.argsort(np.argsort([m.value(c) for c in unseen])) for m in (found, additive)]
    assert np.corrcoef(*ranks)[0, 1] > 0.95
    assert not np.isnan(found.linear).any()


def test_what_is_not_offered_stays_so() -> None:
    linear = _model(14).linear.copy()
    linear[2, 0] = np.nan
    model = PairwiseModel(linear, np.zeros((GROUPS, SCHEMES, 0)))
    choices = [choice for choice in _some(20, 15) if choice[2] != 0]
    found = corrected(model, [(c, 2 * model.value(c)) for c in choices])
    assert np.argwhere(np.isnan(found.linear)).tolist() == [[2, 0]]
