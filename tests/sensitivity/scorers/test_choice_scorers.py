"""Metrics of one layer and scheme, against formulas written out on the model's own outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sensitivity.gram import gram_matrix
from sensitivity.scorers.sqnr import LOSSLESS_DB, decibels
from sensitivity.session import Session
from sensitivity.units import MeasureUnit, ScoreRow, ScoreUnit

METRICS = ("output_kl", "output_mse", "sqnr", "weight_error", "gram_output")
LAYER = {"llama": "model.layers.0.self_attn.v_proj", "resnet": "resnet.embedder.embedder.convolution"}


@pytest.fixture(scope="module", params=["llama", "resnet"])
def session(request: pytest.FixtureRequest, tiny: Any) -> Session:
    return Session(tiny(request.param).spec())


@pytest.fixture
def layer(session: Session) -> str:
    return LAYER["llama" if session.task_name == "causal_lm" else "resnet"]


def score(session: Session, layer: str, scheme: str) -> dict[str, ScoreRow]:
    return {row.metric: row for row in session.run(ScoreUnit(layer, scheme, METRICS)).scores}


def logits(session: Session, layer: str, scheme: str | None) -> Tensor:
    """(samples, rows, outputs) in float64 over the scoring part, one sample at a time."""
    weight = session.weights.parameter(layer)
    stored = weight.detach().clone()
    if scheme is not None:
        weight.data.copy_(session.weights.quantized(layer, scheme))
    try:
        rows = session.samples.parts["scoring"]
        batches = [
            session.samples.batch(rows[i : i + 1], weight.device, weight.dtype) for i in range(len(rows))
        ]
        with torch.no_grad():
            outputs = torch.stack([batch.call(session.model).logits[0] for batch in batches]).double()
    finally:
        weight.data.copy_(stored)
    return outputs[:, :-1] if outputs.ndim == 3 else outputs[:, None]


def test_scores_are_those_of_the_formulas(session: Session, layer: str) -> None:
    for scheme in ("w2", "w4"):
        rows = score(session, layer, scheme)
        y, quantized = logits(session, layer, None), logits(session, layer, scheme)
        logs, other = y.log_softmax(-1), quantized.log_softmax(-1)
        kl = (logs.exp() * (logs - other)).sum(-1).mean(-1)
        assert rows["output_kl"].value == pytest.approx(float(kl.mean()), rel=1e-3)
        assert rows["output_kl"].stderr == pytest.approx(float(kl.std() / len(kl) ** 0.5), rel=1e-3)
        mse = (y - quantized).square().mean((1, 2))
        assert rows["output_mse"].value == pytest.approx(float(mse.mean()), rel=1e-4)
        ratio = float(y.square().sum() / (y - quantized).square().sum())
        assert rows["sqnr"].value == pytest.approx(10 * np.log10(ratio), rel=1e-4)
        error = session.weights.quantized(layer, scheme) - session.weights.parameter(layer)
        assert rows["weight_error"].value == pytest.approx(
            float(error.detach().double().square().sum()), rel=1e-6
        )
        assert rows["weight_error"].stderr is None
        p = logs.exp()
        d = quantized - y
        d = (d - (p * d).sum(-1, keepdim=True)) * p.sqrt() / y.shape[1] ** 0.5
        assert rows["gram_output"].value == pytest.approx(float(d.square().sum()) / 2 / len(y), rel=1e-3)
        assert {row.samples for row in rows.values()} == {0, 6}


def test_the_gram_matrix_predicts_the_divergence_of_plans(tiny: Any) -> None:
    """x'Ax against the measured KL of whole plans of mild schemes, on the samples that made A."""
    session = Session(tiny("llama").spec(samples=12, sequence_length=8))
    layers = [layer.name for layer in session.inventory.layers]
    choices = [(layer, scheme) for layer in layers for scheme in ("w5", "w6")]
    results = {choice: session.run(ScoreUnit(*choice, ("gram_output",))) for choice in choices}
    matrix = gram_matrix(np.stack([results[choice].arrays["sketch"] for choice in choices]))
    for choice, diagonal in zip(choices, matrix.diagonal(), strict=True):
        assert diagonal == pytest.approx(results[choice].scores[0].value, rel=1e-4)
    session.samples.parts["choosing"][:] = session.samples.parts["scoring"]  # type: ignore[index]
    chance = np.random.default_rng(0)
    for _ in range(5):
        plan = {layer: ("w5", "w6")[int(chance.integers(2))] for layer in layers}
        x = np.array([float(plan[layer] == scheme) for layer, scheme in choices])
        measured = session.run(MeasureUnit(tuple(plan.items()), "choosing")).facts["divergence"]["mean"]
        assert x @ matrix @ x == pytest.approx(measured, rel=0.2)


def test_a_lossless_scheme_scores_the_documented_cap(tiny: Any) -> None:
    """Weights that 4 bits hold exactly (their scale is a power of two): no error at all."""
    session = Session(tiny("mlp").spec())
    weight = session.weights.parameter("2")
    weight.data = (
        torch.where(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -7.0, 7.0)
        / 32
    )
    rows = score(session, "2", "w4-rtn")
    assert (rows["sqnr"].value, rows["sqnr"].stderr) == (LOSSLESS_DB, 0.0)
    assert rows["output_kl"].value == rows["weight_error"].value == rows["gram_output"].value == 0.0


def test_the_error_of_decibels_is_that_of_repeated_measurements() -> None:
    chance = np.random.default_rng(0)
    draws = [decibels(chance.gamma(4, 1, 60), chance.gamma(2, 0.01, 60)) for _ in range(400)]
    values, errors = np.array(draws).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)
