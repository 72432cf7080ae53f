"""Metrics of one backward pass, against one gradient at a time from the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quant.layers import Layer
from sensitivity.catalog import SCORERS
from sensitivity.estimators import keyed_generator
from sensitivity.gradients import gradients
from sensitivity.session import Session
from sensitivity.units import BlockPlan, ScoreRow

SCHEMES = ("w2", "w4", "w8")


@pytest.fixture(scope="module", params=["resnet", "llama"])
def session(request: pytest.FixtureRequest, tiny: Any) -> Session:
    return Session(tiny(request.param).spec())


def rows_of(
    session: Session, metric: str, schemes: tuple[str, ...] = SCHEMES
) -> dict[tuple[str, str], ScoreRow]:
    layers = tuple(layer.name for layer in session.inventory.layers)
    plan = BlockPlan(layers, schemes, len(session.samples.parts["scoring"]), session.spec)
    scorer, done = SCORERS[metric].load(), {}
    while units := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in units}
    return {(row.layer, row.scheme): row for row in scorer.combine(plan, done)}


def batches(session: Session) -> Iterator[Any]:
    for row in session.samples.parts["scoring"]:
        yield session.samples.batch(np.array([row]), torch.device("cpu"), torch.float32)


def loss_of(session: Session, batch: Any) -> Tensor:
    logits = batch.call(session.model).logits
    if logits.ndim == 2:
        return nn.functional.cross_entropy(logits, batch.labels)
    return nn.functional.cross_entropy(logits[0, :-1], batch.tokens[0, 1:])


def sampled(session: Session, batch: Any, index: int) -> Tensor:
    outputs = session.task.outputs(session.model, batch)
    return session.task.sampled_objective(outputs, keyed_generator((session.spec.seed, "fisher", index)))


def per_sample(
    session: Session,
    layer: Layer,
    scheme: str,
    objective: Callable[[int, Any], Tensor],
    value: Callable[[Tensor, Tensor], float],
) -> list[float]:
    weight = session.weights.parameter(layer.name)
    error = session.weights.quantized(layer.name, scheme).double() - weight.detach().double()
    found = []
    for index, batch in enumerate(batches(session)):
        with gradients([weight]):
            (gradient,) = torch.autograd.grad(objective(index, batch), weight)
        found.append(value(gradient.double(), error))
    return found


CASES: dict[str, tuple[bool, Callable[[Tensor, Tensor], float]]] = {
    "fisher_diagonal": (True, lambda g, d: float((g**2 * d**2).sum()) / 2),
    "fisher_empirical": (False, lambda g, d: float((g * d).sum()) ** 2 / 2),
    "fisher_empirical_diagonal": (False, lambda g, d: float((g**2 * d**2).sum()) / 2),
    "taylor_first": (False, lambda g, d: abs(float((g * d).sum()))),
    "taylor": (False, lambda g, d: abs(float((g * d).sum()) + float((g * d).sum()) ** 2 / 2)),
}


@pytest.mark.parametrize("metric", CASES)
def test_scores_are_those_of_one_gradient_at_a_time(session: Session, metric: str) -> None:
    draws, value = CASES[metric]

    def objective(index: int, batch: Any) -> Tensor:
        return sampled(session, batch, index) if draws else loss_of(session, batch)

    rows = rows_of(session, metric)
    for layer in session.inventory.layers[:3]:
        for scheme in ("w2", "w4"):
            values = per_sample(session, layer, scheme, objective, value)
            row = rows[layer.name, scheme]
            assert row.value == pytest.approx(np.mean(values), rel=1e-3)
            assert row.stderr == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, rel=1e-2)


def output_of(session: Session, layer: str, batch: Any) -> Iterator[Tensor]:
    """The loss and the layer's output, in one forward pass."""
    kept: list[Tensor] = []
    hook = session.model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, output: kept.append(output)
    )
    loss = loss_of(session, batch)
    hook.remove()
    yield from (loss, kept[0])


def test_gradient_output_is_the_gradient_times_the_change_of_the_output(session: Session) -> None:
    rows = rows_of(session, "gradient_output", ("w3",))
    for layer in session.inventory.layers[:3]:
        values = []
        for batch in batches(session):
            with gradients([session.weights.parameter(layer.name)]):
                loss, before = output_of(session, layer.name, batch)
                (gradient,) = torch.autograd.grad(loss, before)
            with session.weights.swapped([(layer.name, "w3")]), torch.no_grad():
                _, after = output_of(session, layer.name, batch)
            values.append(float((gradient * (after - before.detach())).double().square().sum()))
        assert rows[layer.name, "w3"].value == pytest.approx(np.mean(values), rel=1e-2)
