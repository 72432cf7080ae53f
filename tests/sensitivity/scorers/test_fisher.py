from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator
from sensitivity.gradients import gradients
from sensitivity.scorers.fisher import Fisher
from sensitivity.session import Session
from sensitivity.units import BlockPlan, ScoreRow, ScoreUnit

SCHEMES = ("w2", "w4", "w8")


@pytest.fixture(scope="module")
def session(tiny: Any) -> Session:
    return Session(tiny("resnet").spec())


def plan_of(session: Session) -> BlockPlan:
    layers = tuple(layer.name for layer in session.inventory.layers)
    return BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)


def run_all(
    session: Session, plan: BlockPlan, order: Callable[[list[Any]], list[Any]] = list
) -> tuple[ScoreRow, ...]:
    scorer = Fisher()
    done = {unit.key: session.run(unit).arrays for unit in order(list(scorer.blocks(plan, {})))}
    assert scorer.blocks(plan, done) == ()
    return scorer.combine(plan, done)


def naive_values(session: Session, layer: str, scheme: str) -> list[float]:
    """(g . dW)^2 / 2 with one gradient at a time and the labels the scorer draws."""
    weight = session.weights.parameter(layer)
    error = session.weights.quantized(layer, scheme).double() - weight.detach().double()
    values = []
    for index, row in enumerate(session.samples.parts["scoring"]):
        image = session.samples.tensors["pixel_values"][row : row + 1]
        with gradients([weight]):
            logits = session.model(pixel_values=image).logits
            cumulative = logits.detach().double().softmax(-1).cumsum(-1)[0]
            point = keyed_generator((session.spec.seed, "fisher", index)).random(1)[0]
            label = int((cumulative / cumulative[-1] <= point).sum())
            (gradient,) = torch.autograd.grad(
                nn.functional.cross_entropy(logits, torch.tensor([label])), weight
            )
        values.append(float((gradient.double() * error).sum()) ** 2 / 2)
    return values


def test_scores_are_those_of_one_gradient_at_a_time(session: Session) -> None:
    rows = {(row.layer, row.scheme): row for row in run_all(session, plan_of(session))}
    for (layer, scheme), row in rows.items():
        values = naive_values(session, layer, scheme)
        assert row.value == pytest.approx(np.mean(values), rel=1e-4)
        assert row.stderr == pytest.approx(np.std(values, ddof=1) / 6**0.5, rel=1e-3)
        assert row.samples == 6


def test_one_backward_pass_serves_every_layer_and_scheme(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = session.backward
    monkeypatch.setattr(session, "backward", lambda objective: (calls.append(1), original(objective)))
    run_all(session, plan_of(session))
    assert len(calls) == 6


def test_blocks_are_small_and_can_be_done_in_any_order(tiny: Any) -> None:
    session = Session(replace(tiny("mlp").spec(), samples=7))
    layers = tuple(layer.name for layer in session.inventory.layers)
    plan = BlockPlan(layers, SCHEMES, 19, session.spec)
    units = Fisher().blocks(plan, {})
    assert [unit.block for unit in units] == ["samples:0:8", "samples:8:16", "samples:16:19"]
    assert Fisher().blocks(plan, {units[1].key: {}}) == (units[0], units[2])
    small = BlockPlan(layers, SCHEMES, 7, session.spec)
    assert run_all(session, small) == run_all(session, small, lambda units: units[::-1])


def test_a_score_does_not_depend_on_the_other_choices(session: Session) -> None:
    plan = plan_of(session)
    whole = {(row.layer, row.scheme): row for row in run_all(session, plan)}
    one = replace(plan, layers=plan.layers[1:2], schemes=("w4",))
    (row,) = run_all(session, one)
    assert row == whole[row.layer, row.scheme]


def test_fisher_is_the_divergence_to_second_order(tiny: Any) -> None:
    """With all labels enumerated by many seeds, the mean is the KL of a mild scheme."""
    session = Session(tiny("mlp").spec())
    layer, scheme = "2", "w8"
    kl = session.run(ScoreUnit(layer, scheme, ("output_kl",))).scores[0]
    values = []
    for seed in range(60):
        session.spec = replace(session.spec, seed=seed)
        plan = BlockPlan((layer,), (scheme,), 6, session.spec)
        values += [row.value for row in run_all(session, plan)]
    assert np.mean(values) == pytest.approx(kl.value, abs=4 * np.std(values) / 60**0.5 + 0.02 * kl.value)
    assert np.std(values) / 60**0.5 < kl.value / 5


def test_a_layer_without_a_part_in_the_output_scores_zero(tiny: Any) -> None:
    session = Session(tiny("bert").spec())
    plan = BlockPlan(("pooler.dense",), ("w2",), 6, session.spec)
    assert [(row.value, row.stderr) for row in run_all(session, plan)] == [(0.0, 0.0)]


def test_missing_blocks_are_refused(session: Session) -> None:
    with pytest.raises(ValueError, match=r"all blocks must be done. Got 1 missing, the first 'samples:0:6'"):
        Fisher().combine(plan_of(session), {})


def test_infinite_gradients_name_layer_and_scheme(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny("mlp").spec())
    original = session.task.sampled_objective

    def steep(outputs: Any, generator: Any) -> torch.Tensor:
        objective = original(outputs, generator)
        return (objective - objective.detach()) * 1e38 * 1e38

    monkeypatch.setattr(session.task, "sampled_objective", steep)
    with pytest.raises(NonFiniteScore, match="fisher of layer '2' with scheme 'w4'"):
        run_all(session, BlockPlan(("2",), ("w4",), 6, session.spec))


def test_infinite_outputs_never_become_a_score(tiny: Any) -> None:
    session = Session(tiny("mlp").spec())
    session.model[4].weight.data.fill_(3e38)
    with pytest.raises(NonFiniteScore, match="fisher on sample 0 of the model must be finite"):
        run_all(session, BlockPlan(("2",), ("w4",), 6, session.spec))
