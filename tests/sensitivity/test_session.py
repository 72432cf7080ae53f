"""A session from end to end: the same numbers in any order, on any worker, and the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quant.layers import Inventory
from sensitivity import session as session_module
from sensitivity.catalog import SCORERS, TASKS, offered_metrics
from sensitivity.errors import (
    BadCalibration,
    BadPattern,
    BadUnit,
    MetricNotOffered,
    ModelHasNothingToQuantize,
    NonFiniteScore,
    SessionError,
)
from sensitivity.forwards import Forwards
from sensitivity.memory import CacheBounds
from sensitivity.session import Session
from sensitivity.spec import DataSource, ModelSource, SessionSpec
from sensitivity.units import BlockUnit, InspectUnit, MeasureUnit, ScoreUnit, Unit, UnitResult

NAMES = ("llama", "bert", "resnet", "mlp", "gpt_oss")


@pytest.fixture(scope="module")
def session(tiny: Any) -> Callable[[str], Session]:
    """One session per tiny model, shared by the tests that only read."""
    open_sessions: dict[str, Session] = {}

    def get(name: str) -> Session:
        if name not in open_sessions:
            open_sessions[name] = Session(tiny(name).spec())
        return open_sessions[name]

    return get


def layer_names(session: Session) -> tuple[str, ...]:
    return tuple(layer.name for layer in session.inventory.layers)


def choice_metrics(session: Session) -> tuple[str, ...]:
    """What can be measured of one choice at a time on the session's task and data."""
    has_labels, has_experts = session.samples.labels is not None, bool(session.forwards.routers)
    offered = offered_metrics(session.task_name, has_labels=has_labels, has_experts=has_experts)
    return tuple(name for name in offered if SCORERS[name].unit == "choice")


def units_of(session: Session) -> list[Unit]:
    """Units of every kind."""
    first, second, *_ = layer_names(session)
    plan = tuple((name, "w3") for name in layer_names(session))
    units: list[Unit] = [
        ScoreUnit(name, scheme, choice_metrics(session))
        for name in (first, second)
        for scheme in ("w2", "w4")
    ]
    units += [
        BlockUnit("fisher", f"samples:{a}:{b}", ("w2", "w4"), (first, second)) for a, b in ((0, 4), (4, 6))
    ]
    units += [MeasureUnit(plan, "choosing"), MeasureUnit((), "reporting"), MeasureUnit(plan[:1], "reporting")]
    if "hessian_trace" in session.run(InspectUnit()).facts["available_metrics"]:
        units += [
            BlockUnit("hessian_trace", f"layer:{first}:probes:{a}:{b}", (), (first,))
            for a, b in ((0, 3), (3, 8))
        ]
        units += [BlockUnit("hessian_trace", f"layer:{first}:errors", ("w2", "w4"), (first,))]
    return units


def assert_same(first: UnitResult, second: UnitResult) -> None:
    """Bit for bit; what it cost depends on what was at hand."""
    assert first.scores == second.scores
    assert {**first.facts, "forwards": None} == {**second.facts, "forwards": None}
    assert set(first.arrays) == set(second.arrays)
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])


@pytest.mark.parametrize("name", NAMES)
def test_facts_of_an_inspection(name: str, tiny: Any, session: Callable[[str], Session]) -> None:
    facts = session(name).run(InspectUnit()).facts
    assert facts["task"] == tiny(name).task
    assert facts["samples"] == {"scoring": 6, "choosing": 6, "reporting": 6}
    assert facts["divergence"] == TASKS[tiny(name).task].divergence
    assert facts["dtype"] == "float32"
    assert facts["has_labels"] is (name == "resnet")
    assert ("hessian_trace" in facts["available_metrics"]) is (name not in ("bert", "mlp"))
    assert facts["forward_seconds"] > 0
    inventory = Inventory.from_json(json.loads(json.dumps(facts["inventory"])))
    assert len(inventory.layers) >= 3
    assert all(layer.macs is None or layer.macs > 0 for layer in inventory.layers)
    json.dumps(dict(facts), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_in_any_order_on_any_worker(
    name: str, tiny: Any, session: Callable[[str], Session]
) -> None:
    first, units = session(name), units_of(session(name))
    results = {unit.key: first.run(unit) for unit in units}
    fresh = Session(tiny(name).spec())
    for unit in reversed(units):
        assert_same(fresh.run(unit), results[unit.key])
    for unit in units[::2]:
        assert_same(Session(tiny(name).spec()).run(unit), results[unit.key])


@pytest.mark.parametrize("name", NAMES)
def test_bounded_memory_gives_the_same_numbers(
    name: str, tiny: Any, session: Callable[[str], Session]
) -> None:
    units = units_of(session(name))
    expected = {unit.key: session(name).run(unit) for unit in units}
    small = Session(tiny(name).spec())
    small.forwards = Forwards(
        small.model, small.task, small.samples, small.weights, small.spec.batch_size, reference_bytes=0
    )
    small.bounds = CacheBounds(0, 0, 0, 0, 0)
    for unit in units:
        assert_same(small.run(unit), expected[unit.key])


@pytest.mark.parametrize("name", NAMES)
def test_units_leave_the_model_as_it_was(name: str, tiny: Any) -> None:
    fresh = Session(tiny(name).spec())
    before = {key: value.clone() for key, value in fresh.model.state_dict().items()}
    for unit in units_of(fresh):
        fresh.run(unit)
    for key, value in fresh.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(p.requires_grad or p.grad is not None for p in fresh.model.parameters())
    assert not fresh.model.training


@pytest.mark.parametrize("name", NAMES)
def test_the_full_precision_model_does_not_diverge_from_itself(
    name: str, tiny: Any, session: Callable[[str], Session]
) -> None:
    result = session(name).run(MeasureUnit((), "choosing"))
    assert result.arrays["divergence"].tolist() == [0.0] * 6
    assert result.facts["divergence"] == {"mean": 0.0, "stderr": 0.0, "n": 6}
    assert set(result.facts["quality"]) == (
        {"causal_lm": {"perplexity"}, "image_classification": {"accuracy"}}.get(tiny(name).task, set())
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_measured_as_a_copy_of_the_model_would_be(
    name: str, tiny: Any, session: Callable[[str], Session]
) -> None:
    from quant.apply import quantize_

    kept, copy = session(name), Session(tiny(name).spec())
    plan = {layer: ("w2", "w3", "w4")[index % 3] for index, layer in enumerate(layer_names(kept))}
    result = kept.run(MeasureUnit(tuple(plan.items()), "reporting"))
    quantize_(copy.model, plan, copy.inventory)
    divergence = [
        kept.task.divergence(kept.forwards.outputs(batch), copy.forwards.outputs(batch))
        for batch in kept.forwards.batches("reporting")
    ]
    np.testing.assert_array_equal(result.arrays["divergence"], np.concatenate(divergence))
    assert result.facts["divergence"]["mean"] == pytest.approx(np.concatenate(divergence).mean())
    assert result.facts["divergence"]["mean"] > 0


def test_fewer_samples_go_together_where_their_outputs_are_large(
    tiny: Any, session: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = session("llama")
    assert kept.run(InspectUnit()).facts["batch_size"] == 4
    monkeypatch.setattr(session_module, "MICRO_BATCH_BYTES", 2 * 12 * 48 * 4 + 1)
    small = Session(tiny("llama").spec())
    assert small.run(InspectUnit()).facts["batch_size"] == 2
    assert small.batch_sizes("scoring") == [2, 2, 2]
    unit = ScoreUnit(layer_names(kept)[0], "w3", ("output_kl", "gram_output"))
    for one, other in zip(small.run(unit).scores, kept.run(unit).scores, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


def test_parts_are_measured_on_their_own_samples(session: Callable[[str], Session]) -> None:
    results = [session("llama").run(MeasureUnit((), part)) for part in ("choosing", "reporting")]  # type: ignore[arg-type]
    assert not np.allclose(results[0].arrays["perplexity"], results[1].arrays["perplexity"])


def test_forwards_are_counted(tiny: Any) -> None:
    kept = Session(tiny("resnet").spec())
    first, *_ = layer_names(kept)
    assert kept.run(ScoreUnit(first, "w2", choice_metrics(kept))).facts["forwards"] == 6 + 6
    assert kept.run(ScoreUnit(first, "w3", choice_metrics(kept))).facts["forwards"] == 6
    assert kept.run(ScoreUnit(first, "w2", ("weight_error",))).facts["forwards"] == 0
    assert kept.run(MeasureUnit((), "choosing")).facts["forwards"] == 6
    assert kept.run(MeasureUnit((), "choosing")).facts["forwards"] == 0
    assert kept.run(BlockUnit("fisher", "samples:0:4", ("w2",), (first,))).facts["forwards"] == 12
    one_batch = kept.run(BlockUnit("hessian_trace", f"layer:{first}:probes:0:1", (), (first,))).facts[
        "forwards"
    ]
    assert one_batch in (4 * 7, 2 * 7)


def test_unknown_things_are_refused(session: Callable[[str], Session]) -> None:
    kept = session("mlp")
    for unit, words in (
        (ScoreUnit("nowhere", "w2", ("output_kl",)), "layer must be one that takes part. Got 'nowhere'"),
        (ScoreUnit("0", "v2", ("output_kl",)), "Got 'v2'"),
        (
            ScoreUnit("0", "w2", ("fisher",)),
            "metric of a choice unit must be one of output_kl.* Got 'fisher'",
        ),
        (BlockUnit("output_kl", "samples:0:1", (), ()), "metric of a block unit must be one of .*fisher"),
        (MeasureUnit((("nowhere", "w2"),), "choosing"), "Got 'nowhere'"),
        (BlockUnit("fisher", "samples:0:1", ("v2",), ("0",)), "Got 'v2'"),
    ):
        with pytest.raises(BadUnit, match=words):
            kept.run(unit)


def test_metrics_that_need_more_than_there_is_are_refused(tiny: Any, tmp_path: Path) -> None:
    save_file({"pixel_values": torch.randn(20, 1, 16, 16)}, tmp_path / "x.safetensors")
    spec = replace(
        tiny("resnet").spec(), calibration=DataSource(str(tmp_path / "x.safetensors"), "safetensors", "d")
    )
    unlabeled = Session(spec)
    facts = unlabeled.run(InspectUnit()).facts
    assert facts["has_labels"] is False
    assert "hessian_trace" not in facts["available_metrics"]
    layer, *_ = layer_names(unlabeled)
    with pytest.raises(MetricNotOffered, match="hessian_trace needs double_backward, labels"):
        unlabeled.run(BlockUnit("hessian_trace", f"layer:{layer}:probes:0:2", (), (layer,)))
    assert unlabeled.run(MeasureUnit((), "choosing")).facts["quality"] == {}


class Explodes(nn.Module):
    """Finite at full precision, infinite when its second weight is quantized to a few bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight.data = torch.eye(4) + 0.01
        self.kept: torch.Tensor
        self.register_buffer("kept", self.second.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed = (self.second.weight - self.kept).abs().sum() > 0
        return self.second(self.first(x)) * (torch.inf if changed else 1.0)


def test_infinity_never_becomes_a_score(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("mlp")
    import tiny_factory

    monkeypatch.setattr(tiny_factory, "explodes", Explodes, raising=False)
    data = tiny("mlp").data
    save_file({"x": torch.randn(22, 4)}, data.with_name("four.safetensors"))
    spec = replace(
        tiny("mlp").spec(),
        model=ModelSource("factory", "tiny_factory:explodes", "m"),
        calibration=DataSource(str(data.with_name("four.safetensors")), "safetensors", "d"),
    )
    exploding = Session(spec)
    assert exploding.run(ScoreUnit("first", "w2", ("output_kl",))).scores[0].value > 0
    for metric in ("output_kl", "output_mse", "sqnr", "gram_output"):
        with pytest.raises(
            NonFiniteScore, match=rf"{metric} of layer 'second' with scheme 'w2' must be finite"
        ) as e:
            exploding.run(ScoreUnit("second", "w2", (metric,)))
        assert (e.value.kind, e.value.layer, e.value.scheme, e.value.metric) == (
            "non_finite",
            "second",
            "w2",
            metric,
        )
    with pytest.raises(NonFiniteScore, match="plan of 2 layers"):
        exploding.run(MeasureUnit((("first", "w2"), ("second", "w2")), "choosing"))
    assert exploding.run(MeasureUnit((), "choosing")).facts["divergence"]["mean"] == 0


def test_a_model_without_finite_outputs_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("mlp")
    import tiny_factory

    def overflowing() -> nn.Module:
        model = tiny_factory.build()
        model[4].weight.data.fill_(3e38)
        return model

    monkeypatch.setattr(tiny_factory, "overflowing", overflowing, raising=False)
    spec = replace(tiny("mlp").spec(), model=ModelSource("factory", "tiny_factory:overflowing", "m"))
    with pytest.raises(NonFiniteScore, match="output at full precision of the model must be finite"):
        Session(spec)


def test_inputs_that_the_model_does_not_take(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"pixel_values": torch.randn(20, 3, 16, 16)}, path)
    spec = replace(tiny("resnet").spec(), calibration=DataSource(str(path), "safetensors", "d"))
    with pytest.raises(BadCalibration, match=r"must accept the calibration inputs .*\[20, 3, 16, 16\]"):
        Session(spec)


def test_labels_beyond_the_classes_name_the_row(tiny: Any, tmp_path: Path) -> None:
    labels = torch.zeros(20, dtype=torch.int32)
    labels[11] = 5
    path = tmp_path / "x.safetensors"
    save_file({"pixel_values": torch.randn(20, 1, 16, 16), "labels": labels}, path)
    spec = replace(tiny("resnet").spec(), calibration=DataSource(str(path), "safetensors", "d"))
    with pytest.raises(BadCalibration, match=r"from 0 to 4. Got 5 in row 11"):
        Session(spec)


def test_patterns_choose_the_layers(tiny: Any) -> None:
    spec = tiny("llama").spec()
    some = Session(replace(spec, exclude=("*.mlp.*",)))
    assert not any(".mlp." in name for name in layer_names(some))
    with pytest.raises(BadPattern, match="nowhere"):
        Session(replace(spec, exclude=("nowhere.*",)))
    with pytest.raises(ModelHasNothingToQuantize):
        Session(replace(spec, exclude=("model.*",)))


def test_an_unknown_device_is_refused(tiny: Any) -> None:
    for device in ("abacus", "cuda:99"):
        with pytest.raises(SessionError, match=f"device must be available. Got '{device}'"):
            Session(tiny("mlp").spec(device=device))


def test_scores_do_not_depend_on_which_layers_take_part(tiny: Any, session: Callable[[str], Session]) -> None:
    """Include and exclude patterns are not part of a score set's digest, so they may not change a number."""
    some = Session(replace(tiny("llama").spec(), exclude=("*.mlp.*",)))
    for unit in units_of(some):
        if isinstance(unit, ScoreUnit | BlockUnit):
            assert_same(some.run(unit), session("llama").run(unit))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_are_measured_in_their_own_precision(
    tiny: Any, tmp_path: Path, dtype: str
) -> None:
    from transformers import LlamaForCausalLM

    folder = tmp_path / dtype
    model = LlamaForCausalLM.from_pretrained(tiny("llama").folder, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    tokens = torch.randint(2, 48, (20, 12))
    save_file({"input_ids": tokens}, folder / "tokens.data")
    spec = SessionSpec(
        ModelSource("folder", str(folder), dtype),
        DataSource(str(folder / "tokens.data"), "safetensors", "d"),
        samples=6,
        batch_size=4,
    )
    half = Session(spec)
    assert half.run(InspectUnit()).facts["dtype"] == dtype
    assert {p.dtype for p in half.model.parameters()} == {getattr(torch, dtype)}
    for unit in units_of(half):
        result = half.run(unit)
        assert all(np.isfinite(row.value) for row in result.scores)
    assert half.run(MeasureUnit((), "choosing")).facts["divergence"]["mean"] == 0


def test_every_family_of_formats_is_scored(session: Callable[[str], Session]) -> None:
    kept = session("llama")
    first, *_ = layer_names(kept)
    errors = {
        scheme: kept.run(ScoreUnit(first, scheme, ("output_kl",))).scores[0].value
        for scheme in ("w2", "fp8", "nf4-g16", "nvfp4", "bf16")
    }
    assert 0 <= errors["bf16"] < errors["fp8"] < errors["nf4-g16"] < errors["w2"]
    assert errors["fp8"] < errors["nvfp4"] < errors["w2"]
