"""gram_fisher against explicit products of per-sample gradients, and its model of plans against measured ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sensitivity.estimators import keyed_generator
from sensitivity.gradients import gradients
from sensitivity.gram import gram_matrix, noise_share, plan_stability, shrunk_factor
from sensitivity.scorers import gram_fisher
from sensitivity.scorers.gram_fisher import GramFisher
from sensitivity.session import Session
from sensitivity.units import BlockPlan, ScoreUnit

SCHEMES = ("w2", "w4", "w8")


def plan_of(session: Session) -> BlockPlan:
    layers = tuple(layer.name for layer in session.inventory.layers)
    return BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)


def run_all(session: Session, plan: BlockPlan) -> dict[str, Any]:
    scorer, done = GramFisher(), {}
    while units := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in units}
    return done


@pytest.fixture(scope="module")
def session(tiny: Any) -> Session:
    return Session(tiny("resnet").spec())


@pytest.fixture(scope="module")
def done(session: Session) -> dict[str, Any]:
    return run_all(session, plan_of(session))


def test_products_are_those_of_explicit_gradients(session: Session, done: dict[str, Any]) -> None:
    plan = plan_of(session)
    products = GramFisher().products(plan, done)
    rows = session.samples.parts["scoring"]
    for index, draw, column in ((0, 0, 0), (3, 1, 1), (5, 3, 2)):
        for position, layer in enumerate(plan.layers[:3]):
            weight = session.weights.parameter(layer)
            batch = session.samples.batch(rows[index : index + 1], weight.device, weight.dtype)
            with gradients([weight]):
                outputs = session.task.outputs(session.model, batch)
                generator = keyed_generator((session.spec.seed, "gram_fisher", index, draw))
                (gradient,) = torch.autograd.grad(session.task.sampled_objective(outputs, generator), weight)
            error = session.weights.quantized(layer, SCHEMES[column]).double() - weight.detach().double()
            expected = float((gradient.double() * error).sum())
            assert products[index, draw, position, column] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_scores_are_half_the_mean_square(session: Session, done: dict[str, Any]) -> None:
    plan = plan_of(session)
    products = GramFisher().products(plan, done)
    for row in GramFisher().combine(plan, done):
        own = products[:, :, plan.layers.index(row.layer), SCHEMES.index(row.scheme)]
        per_sample = (own**2).mean(axis=1) / 2
        assert row.value == pytest.approx(per_sample.mean())
        assert row.stderr == pytest.approx(per_sample.std(ddof=1) / len(per_sample) ** 0.5)


def test_the_factor_gives_the_shrunk_products(session: Session, done: dict[str, Any]) -> None:
    plan = plan_of(session)
    products = GramFisher().products(plan, done).reshape(-1, len(plan.layers) * len(SCHEMES))
    factor = GramFisher().factor(plan, done).reshape(products.shape[1], -1)
    kept = 1 - noise_share(products)
    assert 0 < kept <= 1
    expected = kept * products.T @ products / (2 * len(products))
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-10)


def test_many_draws_give_the_gram_matrix_of_the_outputs(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_fisher, "MOST_DRAWS", 400)
    monkeypatch.setattr(gram_fisher, "DRAWS", 400)
    session = Session(tiny("mlp").spec())
    plan = BlockPlan(("0", "2", "4"), ("w6", "w8"), 6, session.spec)
    done = run_all(session, plan)
    products = GramFisher().products(plan, done).reshape(-1, 6)
    estimate = products.T @ products / (2 * len(products))
    sketches = [
        session.run(ScoreUnit(layer, scheme, ("gram_output",))).arrays["sketch"]
        for layer in plan.layers
        for scheme in plan.schemes
    ]
    exact = gram_matrix(np.stack(sketches))
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert np.abs((estimate - exact) / scale).max() < 0.15


def test_draws_end_when_two_halves_rank_plans_alike() -> None:
    generator = np.random.default_rng(0)
    loud = generator.standard_normal((1, 1, 12, 4)) * np.ones((30, 8, 1, 1))
    assert plan_stability(loud, 0) > 0.99
    assert plan_stability(generator.standard_normal((6, 4, 12, 4)), 0) < 0.9
    assert plan_stability(generator.standard_normal((6, 4, 1, 4)), 0) == 1.0


def test_rounds_go_on_until_they_need_not(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(session)
    agreed = iter([0.5, 0.97, 0.99])
    monkeypatch.setattr(gram_fisher, "plan_stability", lambda *_: next(agreed))
    done: dict[str, Any] = {}
    scorer = GramFisher()
    asked = []
    for _ in range(3):
        units = scorer.blocks(plan, done)
        asked.append([unit.block for unit in units])
        done |= {unit.key: {"products": np.ones((6, 4, len(plan.layers), 3))} for unit in units}
        agreed = iter([0.5, 0.97, 0.99])
        monkeypatch.setattr(gram_fisher, "plan_stability", lambda *_, a=agreed: next(a))
    assert asked == [[f"samples:0:6:draws:{a}:{a + 4}"] for a in (0, 4, 8)]
    assert scorer.blocks(plan, done) == ()


def test_noise_is_shrunk_and_signal_is_not() -> None:
    generator = np.random.default_rng(1)
    signal = np.outer(generator.standard_normal(400), generator.standard_normal(40))
    assert noise_share(signal) < 0.05
    assert noise_share(generator.standard_normal((20, 200))) > 0.9
    assert noise_share(np.ones((1, 4))) == 1.0
    assert not shrunk_factor(np.ones((1, 2, 2))).any()


def test_missing_blocks_are_refused(session: Session) -> None:
    with pytest.raises(ValueError, match="all blocks must be done"):
        GramFisher().combine(plan_of(session), {})
