"""Bias and batch-norm corrections against what they promise: the means of the full-precision model."""

import pytest
import torch
from torch import nn

from quant.corrections import (
    batch_norms,
    bias_of,
    corrected_bias,
    corrected_statistics,
    input_statistics,
    replaced_tensors,
)

MODULES = {
    "linear": (nn.Linear(6, 5), (50, 6)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (8, 4, 7, 8)),
    "conv2d grouped": (nn.Conv2d(6, 4, 3, groups=2), (8, 6, 5, 5)),
    "conv1d depthwise": (nn.Conv1d(4, 8, 3, groups=4), (8, 4, 9)),
}


def channels_last(outputs):
    return outputs if outputs.ndim == 2 else outputs.flatten(2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", MODULES)
def test_the_mean_output_of_each_channel_is_that_of_full_precision(name):
    from sensitivity.inputs import input_rows

    torch.manual_seed(0)
    module, shape = MODULES[name]
    op, values = name.partition(" ")[0], torch.randn(shape) + 1
    rows = torch.cat(list(input_rows(module, values)), dim=1)
    quantized = module.weight.detach() + 0.3 * torch.randn_like(module.weight)
    full = channels_last(module(values)).mean(0)
    bias = corrected_bias(module.bias, module.weight, quantized, op, rows.mean(1))
    with torch.no_grad(), replaced_tensors(module, {"weight": quantized, "bias": bias}):
        found = channels_last(module(values)).mean(0)
    with torch.no_grad(), replaced_tensors(module, {"weight": quantized}):
        uncorrected = channels_last(module(values)).mean(0)
    assert torch.allclose(found, full, atol=1e-5)
    assert not torch.allclose(uncorrected, full, atol=1e-2)
    assert torch.equal(channels_last(module(values)).mean(0), full)


def test_only_biases_of_one_module_are_corrected():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Embedding(2, 3))
    assert bias_of(model, "0", "linear") is model[0].bias
    model[1].bias = model[0].bias
    assert bias_of(model, "0", "linear") is None
    assert bias_of(model, "2", "linear") is None
    assert bias_of(model, "3", "embedding") is None


def convolutions():
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)]
    model = nn.Sequential(*layers)
    for module in batch_norms(model).values():
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_statistics_are_means_over_batches_and_leave_the_model_alone():
    model, images = convolutions(), torch.randn(12, 2, 8, 8) + 1
    before = dict(model.state_dict(keep_vars=True))
    values = {name: tensor.clone() for name, tensor in before.items()}

    def run():
        with torch.no_grad():
            for batch in images.split(4):
                model(batch)

    found = input_statistics(model, run)
    inputs = [model[0](batch) for batch in images.split(4)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    assert torch.allclose(found["1"][0], mean, atol=1e-6)
    assert torch.allclose(found["1"][1], variance, atol=1e-5)
    after = dict(model.state_dict(keep_vars=True))
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    assert not any(module.training for module in model.modules())
    assert all(module.momentum == 0.1 for module in batch_norms(model).values())


def test_the_model_is_as_before_when_a_batch_gives_no_statistics():
    model = convolutions()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        input_statistics(model, lambda: model(torch.randn(1, 2, 5, 5)))
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_only_the_change_that_quantizing_brings_is_added():
    model = convolutions()
    full = {path: (m.running_mean + 1, m.running_var * 2) for path, m in batch_norms(model).items()}
    same = corrected_statistics(model, full, full)
    assert same.keys() == {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
    for name, tensor in same.items():
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-6)
    changed = {path: (mean + 3, variance * 4) for path, (mean, variance) in full.items()}
    found = corrected_statistics(model, full, changed)
    assert torch.allclose(found["1.running_mean"], model[1].running_mean + 3)
    assert torch.allclose(found["4.running_var"], model[4].running_var * 4)
    dead = {path: (mean, torch.zeros_like(variance)) for path, (mean, variance) in full.items()}
    assert torch.equal(corrected_statistics(model, dead, full)["1.running_var"], model[1].running_var)


def test_replaced_tensors_return_as_the_very_same_even_when_the_block_raises():
    model = convolutions()
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    def stop():
        with replaced_tensors(model, {"1.running_mean": torch.ones(4)}):
            assert model[1].running_mean.tolist() == [1, 1, 1, 1]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers
    with pytest.raises(AttributeError):
        replaced_tensors(model, {"1.nothing": torch.ones(4)}).__enter__()
