"""Scores and plans with rounded activations: what sessions measure is what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quant.activations import ACTIVATIONS
from quant.apply import fake_quantized
from quant.codecs.activations import Magnitudes, best_range, round_input
from quant.inputs import InputsError
from quant.inventory import take_inventory
from sensitivity.catalog import SCORERS, offered_metrics
from sensitivity.errors import BadUnit, MetricNotOffered
from sensitivity.magnitudes import InputMagnitudes, count_magnitudes
from sensitivity.session import Session
from sensitivity.tasks.task import Batch
from sensitivity.units import BlockPlan, BlockUnit, MeasureUnit, ScoreUnit

Tiny = Callable[[str], Any]
UP = "model.layers.0.mlp.up_proj"
HAS_LABELS = {"image_classification"}
MODELS = {
    "llama": ("causal_lm", UP),
    "bert": ("sequence_embedding", "encoder.layer.0.output.dense"),
    "resnet": ("image_classification", "resnet.encoder.stages.1.layers.0.layer.1.convolution"),
    "mlp": ("generic", "2"),
}


def batches_of(values: torch.Tensor, size: int = 3) -> Callable[[], list[Batch]]:
    return lambda: [Batch({"input": part}, None, "input", len(part)) for part in torch.split(values, size)]


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_multiplies_what_the_format_gives(name: str) -> None:
    model, values = small_model(), torch.randn(10, 32)
    inventory, fmt = take_inventory(model, include=["*"]), ACTIVATIONS[name]
    magnitudes = InputMagnitudes(model, inventory, batches_of(values))

    class Known:
        def __init__(self) -> None:
            self.magnitudes = magnitudes

        def __call__(self, name: str) -> Any:
            raise AssertionError

    before = {key: value.clone() for key, value in model.state_dict().items()}
    inner = model[1](model[0](values))
    limit = best_range(magnitudes("2"), fmt) if fmt.static else None
    with torch.no_grad(), fake_quantized(model, {"2": f"w8-a{name}"}, inventory, Known()):
        weight = model[2].weight.clone()
        expected = model[4](
            model[3](nn.functional.linear(round_input(inner, fmt, "linear", limit), weight, model[2].bias))
        )
        assert torch.equal(model(values), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model[2]._forward_pre_hooks


def test_all_users_of_a_tensor_round_and_embeddings_look_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8)
            self.second.weight = self.table.weight = self.first.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.second(input=self.first(self.table(tokens)))

    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(8)
    fmt = ACTIVATIONS["int4"]
    with torch.no_grad(), fake_quantized(model, {"first": "w8-aint4"}, take_inventory(model, include=["*"])):
        weight = model.first.weight
        inner = nn.functional.linear(round_input(weight, fmt, "linear"), weight, model.first.bias)
        expected = nn.functional.linear(round_input(inner, fmt, "linear"), weight, model.second.bias)
        assert torch.equal(model(tokens), expected)


def test_hooks_go_when_the_block_raises() -> None:
    model = small_model()
    with (
        pytest.raises(KeyError),
        fake_quantized(model, {"0": "w8-aint8"}, take_inventory(model, include=["*"])),
    ):
        raise KeyError
    assert not model[0]._forward_pre_hooks


def test_what_cannot_be_rounded_is_refused_with_a_reason() -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.table = nn.MultiheadAttention(8, 2), nn.Embedding(4, 8)

    model = Attentive()
    inventory = take_inventory(model, include=["*"])
    cases = [
        ("attention.out_proj", "w8-aint8", "weight is used directly"),
        ("table", "w8-aint8", "multiplies no activations"),
        ("attention.out_proj", "w8-anvfp4", "multiples of 16, not 8"),
        ("attention.out_proj", "w8-aint8s", "must be given the magnitudes"),
    ]
    for layer, scheme, message in cases:
        with pytest.raises(InputsError, match=message), fake_quantized(model, {layer: scheme}, inventory):
            pass


def test_padding_is_not_counted_and_inputs_that_are_not_finite_are_named(tiny: Tiny) -> None:
    session = Session(tiny("bert").spec())
    masks = session.samples.tensors["attention_mask"][torch.as_tensor(session.samples.parts["scoring"])]
    seen = session.inputs.magnitudes("encoder.layer.0.output.dense")
    assert int(seen.counts.sum()) == int(masks.sum()) * 24 < masks.numel() * 24
    model = small_model()
    model[0].bias.data[0] = torch.inf
    inventory = take_inventory(model, include=["*"])

    class Known:
        magnitudes = InputMagnitudes(model, inventory, batches_of(torch.randn(4, 32)))

    inside = fake_quantized(model, {"2": "w8-aint8s"}, inventory, Known())  # type: ignore[arg-type]
    with pytest.raises(InputsError, match="must be finite for scheme w8-aint8s"), inside:
        pass


def test_convolutions_count_every_value_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    values = torch.randn(5, 2, 4, 4)
    layers = take_inventory(model, include=["*"]).layers
    found = count_magnitudes(model, layers, batches_of(values, 2)())["0"]
    assert torch.equal(found.counts, Magnitudes.none().plus(values).counts)


@pytest.mark.parametrize("model", MODELS)
def test_sessions_agree_whatever_they_do_first(model: str, tiny: Tiny) -> None:
    """Dynamic and static, weights of two schemes, one layer and whole plans."""
    _, layer = MODELS[model]
    scores = [
        ScoreUnit(layer, scheme, ("output_kl", "output_mse"))
        for scheme in ("w8", "w8-aint4", "w8-aint4s", "w3-aint8s")
    ]
    units: list[Any] = [*scores, MeasureUnit(((layer, "w3-aint8s"),), "choosing")]
    one, two = Session(tiny(model).spec()), Session(tiny(model).spec())
    first = [one.run(unit) for unit in units]
    second = [two.run(unit) for unit in reversed(units)][::-1]
    for mine, other in zip(first, second, strict=True):
        assert mine.scores == other.scores
        assert all(np.array_equal(mine.arrays[name], other.arrays[name]) for name in mine.arrays)
    plain, dynamic, static, _ = (result.scores[0].value for result in first[:4])
    assert plain < min(dynamic, static)
    assert dynamic != static


def test_scores_are_those_of_the_fake_quantized_model(tiny: Tiny) -> None:
    session = Session(tiny("llama").spec())
    for scheme in ("w8-aint4", "w4-aint4s", "w4-smoothquant-aint8", "w8-gptq-smoothquant75-aint4s"):
        measured = session.run(MeasureUnit(((UP, scheme),), "choosing")).arrays["divergence"]
        again = []
        with fake_quantized(session.model, {UP: scheme}, session.inventory, session.inputs):
            for batch in session.forwards.batches("choosing"):
                with torch.inference_mode():
                    again.append(session.task.outputs(session.model, batch))
        expected = [
            session.task.divergence(reference, outputs)
            for reference, outputs in zip(session.forwards.references("choosing"), again, strict=True)
        ]
        assert np.array_equal(measured, np.concatenate(expected))


MEASURED = [
    name
    for name in offered_metrics("causal_lm", has_labels=True, has_experts=False)
    if SCORERS[name].unit != "roles"
]


@pytest.mark.parametrize("metric", MEASURED)
def test_a_metric_sees_activations_or_refuses_the_scheme(metric: str, tiny: Tiny) -> None:
    entry = SCORERS[metric]
    differing = []
    for model, (task, layer) in MODELS.items():
        if metric not in offered_metrics(task, has_labels=task in HAS_LABELS):
            continue
        session = Session(tiny(model).spec())
        if entry.sees_activations and entry.unit == "block":
            scorer, plan = entry.load(), BlockPlan((layer,), ("w8", "w8-aint4"), 6, session.spec)
            done = {unit.key: session.run(unit).arrays for unit in scorer.blocks(plan, {})}
            plain, rounded = scorer.combine(plan, done)
            differing.append(plain.value != rounded.value)
            continue
        if entry.sees_activations:
            units = [ScoreUnit(layer, scheme, (metric,)) for scheme in ("w8", "w8-aint4")]
            whole, fewer = (session.run(unit).scores[0] for unit in units)
            differing.append((whole.value, whole.stderr) != (fewer.value, fewer.stderr))
            continue
        unit: Any = ScoreUnit(layer, "w8-aint4", (metric,))
        if entry.unit == "block":
            unit = BlockUnit(metric, "samples:0:2", ("w8", "w8-aint4"), (layer,))
        with pytest.raises(MetricNotOffered, match=f"Got '{metric}', which looks at weights alone, for"):
            session.run(unit)
    assert any(differing) == entry.sees_activations


def test_a_refusal_of_a_layer_is_a_bad_unit(tiny: Tiny) -> None:
    session = Session(tiny("llama").spec())
    with pytest.raises(BadUnit, match="multiples of 32, not 24"):
        session.run(ScoreUnit("model.layers.0.mlp.down_proj", "w8-amxfp8", ("output_kl",)))
