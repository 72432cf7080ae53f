"""Metrics of weights, inputs and noise, against their definitions written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensitivity.catalog import SCORERS
from sensitivity.estimators import keyed_generator
from sensitivity.gradients import gradients
from sensitivity.scorers.linearity import LEVELS
from sensitivity.session import Session
from sensitivity.units import BlockPlan, ScoreRow, ScoreUnit


@pytest.fixture(scope="module", params=["resnet", "llama"])
def session(request: pytest.FixtureRequest, tiny: Any) -> Session:
    return Session(tiny(request.param).spec())


def one(session: Session, layer: str, scheme: str, metric: str) -> ScoreRow:
    return session.run(ScoreUnit(layer, scheme, (metric,))).scores[0]


def block_rows(session: Session, metric: str, layer: str, schemes: tuple[str, ...]) -> tuple[ScoreRow, ...]:
    plan = BlockPlan((layer,), schemes, len(session.samples.parts["scoring"]), session.spec)
    scorer, done = SCORERS[metric].load(), {}
    while units := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in units}
    return tuple(scorer.combine(plan, done))


def batches(session: Session) -> list[Any]:
    rows = session.samples.parts["scoring"]
    return [
        session.samples.batch(rows[i : i + 1], torch.device("cpu"), torch.float32) for i in range(len(rows))
    ]


def losses(session: Session) -> np.ndarray[Any, Any]:
    found = []
    for batch in batches(session):
        with torch.no_grad():
            logits = batch.call(session.model).logits
        target = batch.labels if logits.ndim == 2 else batch.tokens[0, 1:]
        found.append(
            float(nn.functional.cross_entropy(logits if logits.ndim == 2 else logits[0, :-1], target))
        )
    return np.array(found)


def test_loss_delta_is_the_mean_rise_of_the_loss(session: Session) -> None:
    for layer in session.inventory.layers[:4]:
        before = losses(session)
        with session.weights.swapped([(layer.name, "w2")]):
            rises = losses(session) - before
        row = one(session, layer.name, "w2", "loss_delta")
        assert row.value == pytest.approx(max(rises.mean(), 0), rel=1e-3, abs=1e-6)
        assert row.stderr == pytest.approx(rises.std(ddof=1) / len(rises) ** 0.5, rel=1e-3)


def test_metric_delta_is_the_loss_of_quality(tiny: Any) -> None:
    session = Session(tiny("llama").spec())
    layer = session.inventory.layers[0].name
    before = np.exp(losses(session))
    with session.weights.swapped([(layer, "w2")]):
        worse = np.exp(losses(session)) - before
    assert one(session, layer, "w2", "metric_delta").value == pytest.approx(max(worse.mean(), 0), rel=1e-3)
    session = Session(tiny("resnet").spec())
    layer = session.inventory.layers[0].name
    row = one(session, layer, "w2", "metric_delta")
    assert row.value * 6 == pytest.approx(round(row.value * 6))
    assert row.value >= 0


def test_layer_output_error_is_the_error_at_the_layers_output(session: Session) -> None:
    layer = next(item for item in session.inventory.layers if item.op in ("linear", "conv2d"))
    module = session.model.get_submodule(layer.name)
    total, positions = 0.0, 0
    for batch in batches(session):
        kept: list[Any] = []
        hook = module.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
        with torch.no_grad():
            batch.call(session.model)
            with session.weights.swapped([(layer.name, "w3")]):
                batch.call(session.model)
        hook.remove()
        change = (kept[1] - kept[0]).double()
        total += float(change.square().sum())
        positions += change.numel() // layer.matrix[0]
    row = one(session, layer.name, "w3", "layer_output_error")
    assert row.value == pytest.approx(total / positions, rel=1e-3)


def test_an_embedding_takes_every_row_as_equally_likely(tiny: Any) -> None:
    session = Session(tiny("llama").spec(include=("model.embed_tokens",)))
    error = session.weights.error("model.embed_tokens", "w4").double()
    rows = session.inventory.by_name["model.embed_tokens"].matrix[0]
    found = one(session, "model.embed_tokens", "w4", "layer_output_error")
    assert found.value == pytest.approx(float(error.square().sum()) / rows)


def test_size_normalized_divides_by_a_power_of_the_size(session: Session) -> None:
    layer = session.inventory.layers[1]
    kl, normalized = (one(session, layer.name, "w4", name) for name in ("output_kl", "size_normalized"))
    assert normalized.value == pytest.approx(kl.value * layer.parameters**-0.3)
    assert normalized.stderr == pytest.approx((kl.stderr or 0) * layer.parameters**-0.3)


def test_random_depends_on_seed_and_layer_alone(tiny: Any) -> None:
    session = Session(tiny("mlp").spec())
    drawn = {
        (x, s): one(session, x, s, "random").value for x in ("0", "2") for s in ("w4-float32", "w8-float32")
    }
    ratio = drawn["0", "w4-float32"] / drawn["0", "w8-float32"]
    assert ratio == pytest.approx(4**4)
    assert drawn["0", "w4-float32"] != drawn["2", "w4-float32"]
    other = Session(tiny("mlp").spec(seed=1))
    assert one(other, "0", "w4-float32", "random").value != drawn["0", "w4-float32"]


def test_linearity_is_the_slope_of_divergence_over_noise(tiny: Any) -> None:
    session = Session(tiny("mlp").spec())
    weight = session.weights.parameter("2")
    stored = weight.detach().clone()
    drawn = torch.from_numpy(keyed_generator((0, "linearity", "2")).standard_normal(weight.numel()))
    noise = (drawn / drawn.norm()).reshape(weight.shape) * stored.double().norm()
    reference = torch.stack([b.call(session.model)[0].detach() for b in batches(session)])
    points = []
    for level in LEVELS:
        weight.data = (stored.double() + level * noise).float()
        noisy = torch.stack([b.call(session.model)[0].detach() for b in batches(session)])
        points.append(((noisy - reference).square().sum(-1) / reference.square().sum(-1)).double().numpy())
    weight.data = stored
    squares = np.array(LEVELS) ** 2
    slopes = squares @ np.stack(points) / (squares**2).sum()
    relative = float(
        session.weights.error("2", "w3").double().square().sum() / stored.double().square().sum()
    )
    (row,) = block_rows(session, "linearity", "2", ("w3",))
    assert row.value == pytest.approx(slopes.mean() * relative, rel=1e-3)
    assert row.stderr == pytest.approx(slopes.std(ddof=1) / 6**0.5 * relative, rel=1e-3)
    assert row.samples == 6


def test_the_top_eigenvalue_is_that_of_the_explicit_hessian(tiny: Any) -> None:
    session = Session(tiny("resnet").spec(include=("classifier.1",)))
    layer = "classifier.1"
    weight = session.weights.parameter(layer)
    rows = session.samples.parts["scoring"]
    batch = session.samples.batch(rows, torch.device("cpu"), torch.float32)
    with gradients([weight]):
        loss = nn.functional.cross_entropy(batch.call(session.model).logits, batch.labels)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        hessian = torch.stack(
            [
                torch.autograd.grad(entry, weight, retain_graph=True)[0].reshape(-1)
                for entry in first.reshape(-1)
            ]
        )
    top = float(torch.linalg.eigvalsh(hessian.double()).abs().max())
    error = float(session.weights.error(layer, "w4").double().square().sum())
    (row,) = block_rows(session, "hessian_top_eigenvalue", layer, ("w4",))
    assert row.value == pytest.approx(top / weight.numel() * error, rel=0.03)
    assert row.stderr is not None
