"""kronecker against a dense Fisher information and power iteration on it, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensitivity.errors import NonFiniteScore
from sensitivity.estimators import keyed_generator
from sensitivity.gradients import gradients
from sensitivity.kronecker import HalfSteps, curved
from sensitivity.scorers import kronecker
from sensitivity.scorers.kronecker import HALF_STEPS, Kronecker
from sensitivity.session import Session
from sensitivity.spec import DataSource
from sensitivity.units import BlockPlan, ScoreRow

SCHEMES = ("w2", "w4")
UP = "model.layers.0.mlp.up_proj"
CONVOLUTION = "resnet.embedder.embedder.convolution"


def double(tiny: Any, name: str) -> Session:
    session = Session(tiny(name).spec())
    session.model.double()
    return session


def plan_of(session: Session, *layers: str) -> BlockPlan:
    return BlockPlan(layers, SCHEMES, len(session.samples.parts["scoring"]), session.spec)


def run_all(session: Session, plan: BlockPlan) -> dict[str, Any]:
    scorer, done = Kronecker(), {}
    while units := scorer.blocks(plan, done):
        done |= {unit.key: session.run(unit).arrays for unit in units}
    return done


def rows_of(session: Session, *layers: str) -> dict[tuple[str, str], ScoreRow]:
    plan = plan_of(session, *layers)
    return {(row.layer, row.scheme): row for row in Kronecker().combine(plan, run_all(session, plan))}


def gradients_of(session: Session, layer: str) -> list[np.ndarray]:
    """One sampled label's gradient per sample, as a matrix (rows, columns)."""
    weight = session.weights.parameter(layer)
    found = []
    for index, row in enumerate(session.samples.parts["scoring"]):
        batch = session.samples.batch(np.array([row]), weight.device, weight.dtype)
        with gradients([weight]):
            outputs = session.task.outputs(session.model, batch)
            generator = keyed_generator((session.spec.seed, "fisher", index))
            (gradient,) = torch.autograd.grad(session.task.sampled_objective(outputs, generator), weight)
        found.append(gradient.reshape(len(gradient), -1).numpy())
    return found


def error_of(session: Session, layer: str, scheme: str) -> np.ndarray:
    weight = session.weights.parameter(layer).detach()
    return (session.weights.quantized(layer, scheme) - weight).reshape(len(weight), -1).numpy()


def dense_score(samples: list[np.ndarray], error: np.ndarray) -> float:
    """Power iteration on the dense E[vec(G) vec(G)'], rearranged as in Van Loan and Pitsianis."""
    m, n = samples[0].shape
    fisher = np.mean([np.outer(g.ravel(), g.ravel()) for g in samples], axis=0)
    rearranged = fisher.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)
    outer = np.eye(m).ravel()
    for _ in range(HALF_STEPS // 2):
        inner = rearranged.T @ outer / (outer @ outer)
        outer = rearranged @ inner / (inner @ inner)
    return float(np.trace(outer.reshape(m, m) @ error @ inner.reshape(n, n) @ error.T))


@pytest.mark.parametrize(("model", "layer"), [("resnet", CONVOLUTION), ("llama", UP)])
def test_scores_are_those_of_the_dense_power_iteration(tiny: Any, model: str, layer: str) -> None:
    session = double(tiny, model)
    rows, samples = rows_of(session, layer), gradients_of(session, layer)
    for scheme in SCHEMES:
        expected = dense_score(samples, error_of(session, layer, scheme))
        assert rows[layer, scheme].value == pytest.approx(expected, rel=1e-9)


def test_the_score_is_exact_where_the_hessian_is_a_kronecker_product(tiny: Any, tmp_path: Any) -> None:
    """With one input for all samples each layer's gradient is d a' with the same a: E[dd'] (x) aa'."""
    model = tiny("mlp")
    values = load_file(model.data)["x"]
    save_file({"x": values[:1].repeat(24, 1)}, tmp_path / "same.safetensors")
    data = DataSource(str(tmp_path / "same.safetensors"), "safetensors", "same")
    session = Session(model.spec(calibration=data))
    session.model.double()
    layers = [layer.name for layer in session.inventory.layers]
    rows = rows_of(session, *layers)
    for layer in layers:
        samples = np.stack([g.ravel() for g in gradients_of(session, layer)])
        assert np.linalg.matrix_rank(samples) > 1
        for scheme in SCHEMES:
            error = error_of(session, layer, scheme).ravel()
            assert rows[layer, scheme].value == pytest.approx(np.mean((samples @ error) ** 2), rel=1e-9)


def test_two_half_steps_find_the_factors_of_a_product() -> None:
    """All pairs of three d and four a: E[vec(G) vec(G)'] = E[dd'] (x) E[aa'], of higher rank on both sides."""
    chance = torch.Generator().manual_seed(0)
    left = torch.randn(3, 5, generator=chance, dtype=torch.float64)
    right = torch.randn(4, 6, generator=chance, dtype=torch.float64)
    samples = [torch.outer(d, a)[None] for d in left for a in right]
    values, influences = half_steps(samples, blocks=6).scores([torch.ones(1, 5, 6, dtype=torch.float64)])
    expected = np.mean([float(sample.sum()) ** 2 for sample in samples])
    assert float(values[0]) == pytest.approx(expected, rel=1e-12)
    assert float(influences.mean()) == pytest.approx(expected, rel=1e-12)


def half_steps(samples: list[Tensor], blocks: int) -> HalfSteps:
    """The first two half steps over equal blocks, from the definition."""
    parts = [samples[b * len(samples) // blocks : (b + 1) * len(samples) // blocks] for b in range(blocks)]
    columns = torch.stack([sum(g.mT @ g for g in part) / len(part) for part in parts])
    inner = columns.mean(0) / columns.mean(0).norm()
    rows = torch.stack([sum(g @ inner @ g.mT for g in part) / len(part) for part in parts])
    return HalfSteps(columns, rows, torch.full((blocks,), 1 / blocks, dtype=columns.dtype))


def test_the_standard_error_is_the_spread_over_samples() -> None:
    chance = np.random.default_rng(0)
    scales = torch.from_numpy(np.linspace(0.2, 2.0, 4))
    error = torch.from_numpy(chance.standard_normal((1, 3, 4)))
    found, stated = [], []
    for _ in range(300):
        draws = torch.from_numpy(chance.standard_normal((64, 3, 1)) * chance.standard_normal((64, 1, 4)))
        values, influences = half_steps([g[None] * scales for g in draws], blocks=8).scores([error])
        found.append(float(values[0]))
        stated.append(float(influences.var() / 8))
    assert np.sqrt(np.mean(stated)) == pytest.approx(np.std(found), rel=0.15)


def test_long_sides_keep_a_diagonal_and_say_so(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """up_proj is (24, 16): its outputs keep a diagonal, which is the nearest factor among diagonal ones."""
    monkeypatch.setattr(kronecker, "LARGEST_SIDE", 20)
    session = double(tiny, "llama")
    plan = plan_of(session, UP)
    (shapes,) = Kronecker().blocks(plan, {})
    (note,) = session.run(shapes).facts["notes"]
    assert note["layer"] == UP
    assert note["text"] == (
        f"kronecker of layer '{UP}' keeps the diagonal of the factor of its 24 outputs:"
        " a full one is for at most 20, and 16,777,216 numbers in all groups."
    )
    samples, outer = gradients_of(session, UP), np.ones(24)
    for _ in range(HALF_STEPS // 2):
        inner = np.mean([g.T * outer @ g for g in samples], axis=0) / (outer @ outer)
        outer = np.mean([((g @ inner) * g).sum(1) for g in samples], axis=0) / (inner**2).sum()
    row = rows_of(session, UP)[UP, "w2"]
    error = error_of(session, UP, "w2")
    assert row.value == pytest.approx(float(((error @ inner) * error).sum(1) @ outer), rel=1e-9)


def test_embeddings_and_experts_have_factors_of_their_own(tiny: Any) -> None:
    session = Session(tiny("mixtral").spec(include=("*",)))
    layers = [x for x in session.inventory.layers if x.op in ("embedding", "experts")]
    assert {layer.op for layer in layers} == {"embedding", "experts"}
    rows = rows_of(session, *(layer.name for layer in layers))
    for layer in layers:
        coarse, fine = (rows[layer.name, scheme] for scheme in SCHEMES)
        assert coarse.value > fine.value > 0
        assert coarse.stderr is not None
        assert 0 < coarse.stderr < 2 * coarse.value


def test_factors_of_many_groups_are_diagonal(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four experts of 24 outputs take 2,304 numbers, their 16 inputs 1,024."""
    monkeypatch.setattr(kronecker, "LARGEST_FACTOR", 2000)
    session = Session(tiny("mixtral").spec())
    layer = next(x for x in session.inventory.layers if x.name.endswith("gate_up_proj"))
    plan = plan_of(session, layer.name)
    done = run_all(session, plan)
    shapes = {arrays["0"].shape for arrays in done.values() if "0" in arrays}
    assert shapes == {(4, 16, 16), (4, 24)}
    assert all(row.value > 0 for row in Kronecker().combine(plan, done))


def test_experts_add_up_as_layers_of_their_own(tiny: Any) -> None:
    session = double(tiny, "mixtral")
    layer = next(x for x in session.inventory.layers if x.op == "experts")
    weight = session.weights.parameter(layer.name).detach()
    error = (session.weights.quantized(layer.name, "w2") - weight).numpy()
    samples = gradients_of(session, layer.name)
    total = 0.0
    for expert, own in enumerate(error):
        parts = [g.reshape(error.shape)[expert] for g in samples]
        total += dense_score(parts, own) if np.any(parts) else 0.0
    assert rows_of(session, layer.name)[layer.name, "w2"].value == pytest.approx(total, rel=1e-9)


def test_layers_in_several_passes_get_the_same_scores(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny("resnet").spec())
    layers = [layer.name for layer in session.inventory.layers][:4]
    together = rows_of(session, *layers)
    monkeypatch.setattr(kronecker, "FACTOR_BYTES", 1)
    assert rows_of(session, *layers) == together


def test_a_part_is_asked_for_at_a_time_and_its_steps_can_go_when_it_is_scored(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units of a lot share what they are given, and each layer's half steps are a lot of their own."""
    session = Session(tiny("resnet").spec())
    plan, scorer = plan_of(session, *[layer.name for layer in session.inventory.layers][:3]), Kronecker()
    expected = scorer.combine(plan, run_all(session, plan))
    monkeypatch.setattr(kronecker, "GIVEN_BYTES", 1)
    done: dict[str, Any] = {}
    lots = []
    while units := scorer.blocks(plan, done):
        lots.append({unit.block.split(":")[0] for unit in units} | {str(len(units))})
        assert all(unit.given is units[0].given for unit in units if unit.block.startswith("step:1"))
        done |= {unit.key: session.run(unit).arrays for unit in units}
    assert lots == [{"shapes", "1"}, *[{"step", "6"}] * HALF_STEPS, *[{"layer", "1"}] * 3]
    kept = {key: arrays for key, arrays in done.items() if ":step:" not in key}
    assert len(kept) < len(done)
    assert scorer.blocks(plan, kept) == ()
    assert scorer.combine(plan, kept) == expected
    monkeypatch.setattr(kronecker, "FACTOR_BYTES", 1)
    parts = []
    done = {}
    while units := scorer.blocks(plan, done):
        parts.append({layer for unit in units for layer in unit.layers})
        done |= {unit.key: session.run(unit).arrays for unit in units}
    assert [len(part) for part in parts] == [3, *[1] * 3 * (HALF_STEPS + 1)]


def test_a_lost_block_is_one_block_of_one_half_step(tiny: Any) -> None:
    session = Session(tiny("resnet").spec())
    plan, scorer = plan_of(session, CONVOLUTION), Kronecker()
    done = run_all(session, plan)
    rows = scorer.combine(plan, done)
    (scores,) = (key for key in done if ":scores:" in key)
    for key in list(done):
        kept = {other: arrays for other, arrays in done.items() if other not in (key, scores)}
        for missing in dict.fromkeys((key, scores)):
            (unit,) = scorer.blocks(plan, kept)
            assert unit.key == missing
            kept[missing] = session.run(unit).arrays
        assert scorer.combine(plan, kept) == rows
    with pytest.raises(ValueError, match="all blocks must be done"):
        scorer.combine(plan, {})


def test_a_new_menu_needs_no_pass(tiny: Any) -> None:
    session = Session(tiny("resnet").spec())
    plan = plan_of(session, CONVOLUTION)
    done = run_all(session, plan)
    other = BlockPlan(plan.layers, ("w3",), plan.samples, plan.settings)
    (unit,) = Kronecker().blocks(other, done)
    assert unit.block == f"layer:{CONVOLUTION}:scores"
    assert session.run(unit).facts["forwards"] == 0


def test_what_is_not_finite_is_named(tiny: Any) -> None:
    session = Session(tiny("mlp").spec())
    plan, scorer = plan_of(session, "2"), Kronecker()
    done = {unit.key: session.run(unit).arrays for unit in scorer.blocks(plan, {})}
    first, *_ = scorer.blocks(plan, done)
    done |= {unit.key: session.run(unit).arrays for unit in scorer.blocks(plan, done)}
    second, *_ = scorer.blocks(plan, done)
    huge = {name: np.full_like(array, np.inf) for name, array in second.given.items()}
    with pytest.raises(NonFiniteScore, match="kronecker of layer '2'"):
        session.run(replace(second, given=huge))
    session.weights.parameter("0").data.fill_(np.inf)
    with pytest.raises(NonFiniteScore, match="kronecker on sample 0"):
        session.run(first)


@pytest.mark.parametrize("full", [True, False])
def test_products_with_factors_are_those_of_matrices(full: bool) -> None:
    chance = torch.Generator().manual_seed(1)
    matrices = torch.randn(2, 3, 4, generator=chance)
    diagonal = torch.rand(2, 4, generator=chance)
    expected = matrices @ torch.diag_embed(diagonal) @ matrices.mT
    for factor in (diagonal, torch.diag_embed(diagonal)):
        found = curved(matrices, factor, full=full)
        torch.testing.assert_close(found, expected if full else expected.diagonal(dim1=1, dim2=2))
