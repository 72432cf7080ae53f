"""`pairwise` against its definition, and what its quadratic model knows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from sensitivity.scorers.pairwise import Pairwise, pair_matrix
from sensitivity.session import Session
from sensitivity.units import BlockPlan

Tiny = Callable[[str], Any]
SCHEMES = ("w2", "w4")


@pytest.fixture(scope="module")
def session(tiny: Tiny) -> Session:
    return Session(tiny("mlp").spec())


@pytest.fixture(scope="module")
def plan(session: Session) -> BlockPlan:
    layers = tuple(layer.name for layer in session.inventory.layers)[:3]
    return BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)


@pytest.fixture(scope="module")
def done(session: Session, plan: BlockPlan) -> dict[str, Any]:
    return {unit.key: session.run(unit).arrays for unit in Pairwise().blocks(plan, {})}


def loss(session: Session, plan: BlockPlan, choice: tuple[int | None, ...]) -> float:
    """Mean divergence of a whole run with the chosen schemes; None leaves a layer alone."""
    assignment = tuple(
        (layer, SCHEMES[scheme])
        for layer, scheme in zip(plan.layers, choice, strict=True)
        if scheme is not None
    )
    parts = [
        session.task.divergence(reference, session.forwards.outputs(batch, assignment))
        for batch, reference in zip(
            session.forwards.batches("scoring"), session.forwards.references("scoring"), strict=True
        )
    ]
    return float(np.concatenate(parts).mean())


def test_scores_are_what_each_choice_does_alone(session: Session, plan: BlockPlan, done: Any) -> None:
    rows = Pairwise().combine(plan, done)
    assert len(rows) == len(plan.layers) * len(SCHEMES)
    for row in rows:
        alone = tuple(SCHEMES.index(row.scheme) if layer == row.layer else None for layer in plan.layers)
        assert row.value == pytest.approx(loss(session, plan, alone), rel=1e-9)


def test_the_model_is_exact_for_plans_of_two_layers(session: Session, plan: BlockPlan, done: Any) -> None:
    """Without the projection x'Gx / 2 is the measured divergence of any two choices."""
    scorer = Pairwise()
    count, schemes = len(plan.layers), len(SCHEMES)
    from sensitivity.scorers.pairwise import _runs

    gram = pair_matrix(_runs(count, schemes), scorer._values(plan, done).mean(axis=1), schemes)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for a, b in product(range(schemes), repeat=2):
            i, j = first * schemes + a, second * schemes + b
            choice = tuple({first: a, second: b}.get(layer) for layer in range(count))
            measured = loss(session, plan, choice)
            assert gram[i, i] + gram[j, j] + 2 * gram[i, j] == pytest.approx(measured, rel=1e-9, abs=1e-15)


def test_the_factor_is_the_nearest_semidefinite_matrix(plan: BlockPlan, done: Any) -> None:
    from sensitivity.scorers.pairwise import _runs

    scorer = Pairwise()
    gram = pair_matrix(
        _runs(len(plan.layers), len(SCHEMES)), scorer._values(plan, done).mean(axis=1), len(SCHEMES)
    )
    values, vectors = np.linalg.eigh(gram)
    nearest = vectors @ np.diag(np.maximum(values, 0)) @ vectors.T
    factor = scorer.factor(plan, done).reshape(len(gram), -1)
    np.testing.assert_allclose(factor @ factor.T, nearest, rtol=1e-9, atol=1e-12 * abs(gram).max())


def test_a_lost_block_is_all_that_is_lost(plan: BlockPlan, done: Any) -> None:
    scorer = Pairwise()
    units = scorer.blocks(plan, {})
    rest = {key: arrays for key, arrays in done.items() if key != units[0].key}
    assert scorer.blocks(plan, rest) == units[:1]
    with pytest.raises(ValueError, match="all blocks must be done"):
        scorer.combine(plan, rest)
