from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensitivity.errors import NonFiniteScore
from sensitivity.scorers.hessian_trace import HessianTrace, final_trace, looks
from sensitivity.scorers.protocol import Done
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import Arrays, BlockPlan, BlockUnit

SPEC = SessionSpec(
    ModelSource("folder", "m", "aa"), DataSource("c", "text", "bb"), max_probes=64, relative_error=0.1
)
LAYER = "resnet.encoder.stages.0.layers.0.layer.0.convolution"


def plan_with(**settings: Any) -> BlockPlan:
    return BlockPlan(("fc",), ("w2", "w4"), 20, replace(SPEC, **settings))


def finished(plan: BlockPlan, draw: Any) -> tuple[dict[str, Arrays], int]:
    """Everything `blocks` asks for, answered by `draw(probe)`, and how many rounds it took."""
    scorer, done, rounds = HessianTrace(), {}, 0
    while units := scorer.blocks(plan, done):
        rounds += 1
        for unit in units:
            done[unit.key] = answer(unit, draw)
    return done, rounds


def answer(unit: BlockUnit, draw: Any) -> Arrays:
    if unit.block.endswith(":errors"):
        return {"squared_errors": np.array([3.0, 1.0]), "parameters": np.array([10.0])}
    start, stop = map(int, unit.block.split(":")[-2:])
    return {"forms": np.array([draw(probe) for probe in range(start, stop)])}


def test_the_score_is_trace_over_parameters_times_squared_error() -> None:
    plan = plan_with()
    done, rounds = finished(plan, lambda probe: 5.0)
    rows = HessianTrace().combine(plan, done)
    assert [(row.scheme, row.value, row.stderr, row.samples) for row in rows] == [
        ("w2", 1.5, 0.0, 16),
        ("w4", 0.5, 0.0, 16),
    ]
    assert rounds == 1


def test_sampling_stops_at_the_first_look_that_meets_the_error() -> None:
    chance = np.random.default_rng(0)
    draws = chance.normal(1.0, 0.45, 64)
    plan = plan_with()
    done, _ = finished(plan, lambda probe: draws[probe])
    trace = final_trace(plan, "fc", done)
    assert trace.n == 32
    assert trace.relative_error <= 0.1
    assert trace.value == pytest.approx(draws[:32].mean())


def test_sampling_ends_with_the_budget() -> None:
    plan = plan_with(max_probes=40)
    done, rounds = finished(plan, lambda probe: (-1.0) ** probe * 7 + 1)
    row, *_ = HessianTrace().combine(plan, done)
    assert (row.samples, rounds) == (40, 3)
    assert row.stderr is not None
    assert row.stderr > 0.1 * row.value


@pytest.mark.parametrize("most", [2, 15, 16, 17, 31, 32, 100, 128])
def test_a_budget_is_used_to_the_last_probe(most: int) -> None:
    assert list(looks(most))[-1] == most
    done, _ = finished(plan_with(max_probes=most), lambda probe: (-1.0) ** probe)
    assert sum(len(arrays["forms"]) for arrays in done.values() if "forms" in arrays) == most


def test_blocks_done_ahead_do_not_change_the_stop() -> None:
    plan = plan_with()
    done, _ = finished(plan, lambda probe: 5.0 + probe % 2)
    later = BlockUnit("hessian_trace", "layer:fc:probes:16:32", (), ("fc",))
    ahead: Done = {**done, later.key: {"forms": np.full(16, 1e9)}}
    assert HessianTrace().combine(plan, ahead) == HessianTrace().combine(plan, done)


def test_traces_are_shared_by_all_menus_of_schemes() -> None:
    plan = plan_with()
    done, _ = finished(plan, lambda probe: 5.0)
    other = replace(plan, schemes=("w3",))
    assert [unit.block for unit in HessianTrace().blocks(other, done)] == ["layer:fc:errors"]


def test_missing_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="all blocks must be done"):
        HessianTrace().combine(plan_with(), {})


@pytest.fixture(scope="module")
def session(tiny: Any) -> Session:
    return Session(tiny("resnet").spec(max_probes=2048, relative_error=1e-9))


def exact_trace(session: Session, layer: str) -> float:
    """Trace of the Hessian of the mean loss over the scoring part, column by column."""
    weight = session.weights.parameter(layer).detach()
    rows = torch.as_tensor(session.samples.parts["scoring"])
    images, labels = session.samples.tensors["pixel_values"][rows], session.samples.labels
    assert labels is not None

    def loss(flat: torch.Tensor) -> torch.Tensor:
        changed = {f"{layer}.weight": flat.view_as(weight)}
        logits = torch.func.functional_call(session.model, changed, kwargs={"pixel_values": images}).logits
        return nn.functional.cross_entropy(logits, labels[rows])

    gradient = torch.func.grad(loss)
    identity = torch.eye(weight.numel())
    products = torch.func.vmap(
        lambda v: torch.func.jvp(gradient, (weight.flatten(),), (v,))[1], chunk_size=64
    )
    return float(products(identity).trace())


def test_probes_estimate_the_exact_trace_of_the_scoring_part(session: Session) -> None:
    probes = session.run(BlockUnit("hessian_trace", f"layer:{LAYER}:probes:0:600", (), (LAYER,)))
    forms = probes.arrays["forms"]
    assert forms.mean() == pytest.approx(exact_trace(session, LAYER), abs=4 * forms.std() / 600**0.5)
    assert forms.std() / 600**0.5 < 0.1 * forms.mean()


def test_a_probe_depends_on_its_number_alone(session: Session) -> None:
    def forms(start: int, stop: int) -> np.ndarray:
        unit = BlockUnit("hessian_trace", f"layer:{LAYER}:probes:{start}:{stop}", (), (LAYER,))
        return session.run(unit).arrays["forms"]

    whole = forms(0, 9)
    np.testing.assert_array_equal(whole, np.concatenate([forms(0, 4), forms(4, 5), forms(5, 9)]))
    assert len(set(whole)) == 9


def test_errors_are_those_of_the_weights(session: Session) -> None:
    unit = BlockUnit("hessian_trace", f"layer:{LAYER}:errors", ("w2", "w4"), (LAYER,))
    arrays = session.run(unit).arrays
    expected = [
        float(session.weights.error(LAYER, scheme).double().square().sum()) for scheme in ("w2", "w4")
    ]
    np.testing.assert_allclose(arrays["squared_errors"], expected)
    assert arrays["parameters"].tolist() == [session.weights.parameter(LAYER).numel()]


def test_an_infinite_loss_names_the_layer(tiny: Any) -> None:
    session = Session(tiny("resnet").spec())
    session.weights.parameter("resnet.embedder.embedder.convolution").data.fill_(math.inf)
    with pytest.raises(NonFiniteScore, match=f"hessian_trace of layer '{LAYER}'"):
        session.run(BlockUnit("hessian_trace", f"layer:{LAYER}:probes:0:2", (), (LAYER,)))
