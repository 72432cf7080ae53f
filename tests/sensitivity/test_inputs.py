"""The rows that second moments are made of, and that nothing but the data decides them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.inventory import take_inventory
from quant.ops import to_matrix
from sensitivity.inputs import InputStatistics, collect, input_rows
from sensitivity.session import Session
from sensitivity.tasks.task import Batch
from sensitivity.units import BlockUnit, MeasureUnit, ScoreUnit

MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 2), bias=False), (2, 4, 7, 8)),
    "conv2d dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 9, 8)),
    "conv2d reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), (2, 3, 5, 5)),
    "conv2d grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1, bias=False), (2, 6, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (2, 4, 9)),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_rows_times_the_weight_are_the_outputs(name: str) -> None:
    torch.manual_seed(0)
    module, shape = MODULES[name]
    values = torch.randn(shape)
    rows = torch.cat(list(input_rows(module, values)), dim=1)
    op = name.partition(" ")[0]
    weight = to_matrix(module.weight.detach(), op)  # type: ignore[arg-type]
    parts = weight.reshape(len(rows), -1, weight.shape[1])
    found = torch.einsum("gnc,gkc->ngk", rows, parts).flatten(1)
    outputs = module(values).detach()
    expected = outputs.flatten(0, -2) if op == "linear" else outputs.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected)


def batches_of(values: Tensor, size: int = 4) -> Callable[[], list[Batch]]:
    return lambda: [Batch({"input": part}, None, "input", len(part)) for part in torch.split(values, size)]


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))


def test_moments_are_the_mean_of_outer_products_and_memory_does_not_matter() -> None:
    model, values = small_model(), torch.randn(10, 8)
    inventory = take_inventory(model, include=["*"])
    roomy = InputStatistics(model, inventory, batches_of(values))
    tight = InputStatistics(model, inventory, batches_of(values), cache_bytes=300)
    assert roomy("0").samples == 10
    torch.testing.assert_close(roomy("0").second_moments[0], values.T @ values / 10)
    for name in ("4", "0", "2", "0", "4"):
        assert torch.equal(roomy(name).second_moments, tight(name).second_moments)
    assert roomy("2") is roomy("2")


def test_tied_layers_see_the_inputs_of_all_their_modules() -> None:
    model, values = small_model(), torch.randn(10, 8)
    model[2].weight = model[0].weight
    inventory = take_inventory(model, include=["*"])
    found = InputStatistics(model, inventory, batches_of(values))("0")
    inner = model[1](model[0](values))
    assert found.samples == 20
    expected = (values.T @ values + inner.T @ inner) / 20
    torch.testing.assert_close(found.second_moments[0], expected.detach())


def test_a_layer_that_the_data_never_reach_has_zeros() -> None:
    model = small_model()
    model.spare = nn.Linear(8, 8)
    model.forward = model[0].forward  # type: ignore[method-assign]
    inventory = take_inventory(model, include=["*"])
    found = collect(model, inventory.layers, batches_of(torch.randn(4, 8))())["spare"]
    assert found.samples == 0
    assert not found.second_moments.any()


def test_padding_never_counts() -> None:
    module, values = nn.Linear(3, 2), torch.randn(2, 4, 3)
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    [rows] = input_rows(module, values, real)
    assert torch.equal(rows[0], torch.cat([values[0, :3], values[1, :1]]))
    [flat] = input_rows(module, values.reshape(8, 3), real)
    assert torch.equal(flat, rows)
    [pooled] = input_rows(module, values[:, 0], real)
    assert pooled.shape == (1, 2, 3)


def test_scores_and_plans_use_the_same_weights_wherever_they_come_first(tiny: Callable[[str], Any]) -> None:
    spec = tiny("llama").spec()
    plan = MeasureUnit(
        (("model.layers.0.mlp.up_proj", "w3-gptq"), ("model.layers.1.mlp.up_proj", "w2-gptq")), "choosing"
    )
    layers = ("model.layers.1.mlp.up_proj",)
    fisher = BlockUnit("fisher", "samples:0:4", ("w2-gptq",), layers)
    score = ScoreUnit(layers[0], "w2-gptq", ("output_kl",))
    forward, backward = Session(spec), Session(spec)
    first = [forward.run(unit) for unit in (score, plan, fisher)]
    second = [backward.run(unit) for unit in (fisher, plan, score)][::-1]
    assert [r.scores for r in first] == [r.scores for r in second]
    for one, two in zip(first, second, strict=True):
        for name, array in one.arrays.items():
            assert (array == two.arrays[name]).all()


def test_statistics_come_from_the_scoring_part_of_the_data_that_the_spec_names(
    tiny: Callable[[str], Any],
) -> None:
    spec = tiny("bert").spec()
    elsewhere = Session(tiny("bert").spec(samples=4, seed=3, statistics=spec))
    own = Session(spec)
    name = own.inventory.layers[0].name
    assert torch.equal(own.inputs(name).second_moments, elsewhere.inputs(name).second_moments)
    assert len(own.samples.parts["scoring"]) == 6
    masks = own.samples.tensors["attention_mask"][torch.as_tensor(own.samples.parts["scoring"])]
    assert own.inputs(name).samples == int(masks.sum()) < masks.numel()


def test_gptq_lowers_the_error_of_outputs_in_real_layers(tiny: Callable[[str], Any]) -> None:
    session = Session(tiny("resnet").spec())
    for layer in session.inventory.layers:
        known = session.inputs(layer.name)
        errors = SimpleNamespace()
        for scheme in ("w3", "w3-gptq", "w3-rtn"):
            error = session.weights.error(layer.name, scheme).reshape(layer.matrix)
            setattr(errors, scheme.replace("-", "_"), float(known.output_errors(error).sum()))
        assert errors.w3_gptq <= min(errors.w3, errors.w3_rtn) * 1.0001
