from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensitivity.errors import NonFiniteScore
from sensitivity.scorers import hessian_trace
from sensitivity.scorers.hessian_trace import (
    HessianTrace,
    _units,
    batch_of,
    chosen,
    turn_size,
)
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
    kind, start, stop = unit.block.split(":")[-3:]
    forms = np.array([draw(probe) for probe in range(int(start), int(stop))])
    if kind == "probes":
        return {"forms": forms}
    return {"forms": forms[: len(forms) // 2], "draws": forms[: len(forms) // 2] + 1.0}


def test_the_score_is_trace_over_parameters_times_squared_error() -> None:
    plan = plan_with(max_probes=32)
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
    plan = plan_with(max_probes=48)
    done, _ = finished(plan, lambda probe: draws[probe])
    row = HessianTrace().combine(plan, done)[0]
    assert row.samples == 32
    assert row.stderr is not None
    assert 0 < row.stderr / row.value <= 0.1


def test_sampling_ends_with_the_budget() -> None:
    plan = plan_with(max_probes=40)
    done, rounds = finished(plan, lambda probe: (-1.0) ** probe * 7 + 1)
    row, *_ = HessianTrace().combine(plan, done)
    assert (row.samples, rounds) == (40, 3)
    assert row.stderr is not None
    assert row.stderr > 0.1 * row.value


@pytest.mark.parametrize("most", [2, 3, 15, 16, 17, 31, 32, 64, 100, 128, 999])
def test_a_budget_is_used_to_the_last_turn(most: int) -> None:
    plan = plan_with(max_probes=most)
    done, _ = finished(plan, lambda probe: (-1.0) ** probe)
    spent = sum(len(arrays.get("draws", ())) + len(arrays.get("forms", ())) for arrays in done.values())
    size = turn_size(plan.settings, 3)
    assert spent == most // size * size
    assert most - spent < size
    row, *_ = HessianTrace().combine(plan, done)
    assert row.draws is not None
    assert row.stderr == pytest.approx(row.draws.std(ddof=1) / row.samples**0.5)
    assert row.value == pytest.approx(row.draws.mean())
    assert row.samples == len(row.draws) > spent / 2 - size


def test_blocks_done_ahead_do_not_change_the_stop() -> None:
    plan = plan_with(max_probes=48)
    done, _ = finished(plan, lambda probe: 5.0 + probe % 2)
    later = BlockUnit("hessian_trace", "layer:fc:probes:16:32", (), ("fc",))
    ahead: Done = {**done, later.key: {"forms": np.full(16, 1e9)}}
    assert HessianTrace().combine(plan, ahead) == HessianTrace().combine(plan, done)


def test_the_pilot_chooses_the_smaller_variance_per_product() -> None:
    """XTrace pays two products for a draw, and its variance is doubled: a quarter of the forms' is a tie."""
    plan = plan_with(max_probes=64)
    pilot = HessianTrace().blocks(plan, {})[:2]
    assert [unit.block for unit in pilot] == ["layer:fc:xtrace:0:16", "layer:fc:xtrace:16:32"]
    forms = np.tile([1.0, 3.0, 1.0, 3.0], 2)
    for scale, estimator in ((0.45, "xtrace"), (0.55, "probes")):
        done = {unit.key: {"forms": forms, "draws": 2 + (forms - 2) * scale} for unit in pilot}
        assert chosen(plan, "fc", done) == estimator
        later = [unit.block for unit in _units(plan, "fc", done, 8)]
        assert later[2:] == [f"layer:fc:{estimator}:{a}:{a + 16}" for a in (32, 48)]


def test_every_micro_batch_is_met_before_any_comes_again() -> None:
    met = [batch_of(turn, "fc", 5, 0) for turn in range(10)]
    assert sorted(met[:5]) == [0, 1, 2, 3, 4]
    assert met[5:] == met[:5]
    assert any(batch_of(turn, "fd", 5, 0) != met[turn] for turn in range(5))


def test_micro_batches_weigh_as_many_samples_as_they_hold() -> None:
    """20 samples by eight: 8, 8 and 4, each with its own trace."""
    plan = plan_with(max_probes=48)
    done: dict[str, Arrays] = {}
    while units := HessianTrace().blocks(plan, done):
        for unit in units:
            start = int(unit.block.split(":")[-2]) if ":probes:" in unit.block else 0
            traces = [float(batch_of(turn, "fc", 3, 0)) for turn in range(start // 8, start // 8 + 2)]
            done[unit.key] = answer(unit, lambda probe, t=traces, s=start: t[(probe - s) // 8])
    row = HessianTrace().combine(plan, done)[0]
    assert row.samples == 32
    assert row.value == pytest.approx(0.3 * (8 * 0 + 8 * 1 + 4 * 2) / 20)
    assert row.stderr == 0.0


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
    return Session(tiny("resnet").spec(max_probes=64, relative_error=1e-9))


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


@pytest.mark.parametrize("kind", ["probes", "xtrace"])
def test_both_estimators_find_the_exact_trace_of_the_scoring_part(session: Session, kind: str) -> None:
    products = 512 if kind == "probes" else 192
    found = session.run(BlockUnit("hessian_trace", f"layer:{LAYER}:{kind}:0:{products}", (), (LAYER,))).arrays
    turns = found["forms" if kind == "probes" else "draws"].reshape(products // 8, -1).mean(axis=1)
    sizes = session.batch_sizes("scoring")
    met = np.array([batch_of(turn, LAYER, len(sizes), 0) for turn in range(len(turns))])
    own = [turns[met == batch] for batch in range(len(sizes))]
    weights = np.array(sizes) / sum(sizes)
    value = sum(weight * part.mean() for weight, part in zip(weights, own, strict=True))
    error = sum(w**2 * part.var() / len(part) for w, part in zip(weights, own, strict=True)) ** 0.5
    assert value == pytest.approx(exact_trace(session, LAYER), abs=4 * error)
    assert error < 0.1 * value


def test_the_pilots_probes_are_those_of_the_first_products(session: Session) -> None:
    def arrays(kind: str) -> Arrays:
        return session.run(BlockUnit("hessian_trace", f"layer:{LAYER}:{kind}:0:16", (), (LAYER,))).arrays

    forms, alone = arrays("xtrace")["forms"], arrays("probes")["forms"]
    np.testing.assert_allclose(forms, [*alone[:4], *alone[8:12]], rtol=1e-4)


def test_a_layer_too_large_for_xtrace_has_plain_products_from_the_first(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = session.weights.parameter(LAYER).numel()
    monkeypatch.setattr(hessian_trace, "XTRACE_BYTES", 4 * 8 * hessian_trace.XTRACE_COPIES * parameters - 1)
    plan = BlockPlan((LAYER,), ("w4",), 6, session.spec)
    done: dict[str, Arrays] = {}
    while units := HessianTrace().blocks(plan, done):
        done |= {unit.key: dict(session.run(unit).arrays) for unit in units}
    assert chosen(plan, LAYER, done) == "probes"
    (row,) = HessianTrace().combine(plan, done)
    assert row.samples == session.spec.max_probes
    plain = session.run(BlockUnit("hessian_trace", f"layer:{LAYER}:probes:0:16", (), (LAYER,))).arrays
    pilot = session.run(BlockUnit("hessian_trace", f"layer:{LAYER}:xtrace:0:16", (), (LAYER,))).arrays
    assert set(pilot) == {"forms"}
    np.testing.assert_array_equal(pilot["forms"], plain["forms"])


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
