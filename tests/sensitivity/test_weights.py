from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quant.inventory import take_inventory
from sensitivity.errors import BadUnit, NonFiniteWeights
from sensitivity.weights import LayerWeights


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)


def weights_of(model: nn.Module, **settings: Any) -> LayerWeights:
    return LayerWeights(model, take_inventory(model), **settings)


def test_swapped_weights_come_back_as_the_very_same_tensors(model: nn.Sequential) -> None:
    weights = weights_of(model)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    with weights.swapped((("0", "w2"), ("2", "w3"))):
        assert torch.equal(model[0].weight, weights.quantized("0", "w2"))
        assert torch.equal(model[2].weight, weights.quantized("2", "w3"))
        assert len(model[0].weight.unique()) > 1
        assert max(len(row.unique()) for row in model[0].weight) <= 4
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_swapped_weights_come_back_after_an_error(model: nn.Sequential) -> None:
    before = model[0].weight.clone()
    with pytest.raises(KeyError), weights_of(model).swapped((("0", "w2"),)):
        raise KeyError
    assert torch.equal(model[0].weight, before)


def test_an_unknown_layer_leaves_everything_in_place(model: nn.Sequential) -> None:
    before = model[0].weight.clone()
    with pytest.raises(BadUnit, match="Got '7'"), weights_of(model).swapped((("0", "w2"), ("7", "w2"))):
        raise AssertionError
    assert torch.equal(model[0].weight, before)


def test_shared_weights_are_swapped_for_every_user(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight
    weights = weights_of(model)
    with weights.swapped((("0", "w2"),)):
        assert torch.equal(model[2].weight, weights.quantized("0", "w2"))
    assert model[2].weight is model[0].weight


def test_the_error_is_the_difference(model: nn.Sequential) -> None:
    weights = weights_of(model)
    error = weights.error("0", "w3")
    assert error.shape == (64,)
    torch.testing.assert_close(error.view(8, 8) + model[0].weight, weights.quantized("0", "w3"))


def test_the_cache_is_bounded_and_changes_nothing(model: nn.Sequential) -> None:
    kept, small, none = (
        weights_of(model),
        weights_of(model, cache_bytes=300),
        weights_of(model, cache_bytes=0),
    )
    for _ in range(2):
        for name in ("0", "2"):
            for scheme in ("w2", "w4"):
                expected = kept.quantized(name, scheme)
                assert torch.equal(small.quantized(name, scheme), expected)
                assert torch.equal(none.quantized(name, scheme), expected)
    assert kept.quantized("0", "w2") is kept.quantized("0", "w2")
    assert small.quantized("2", "w4") is small.quantized("2", "w4")
    assert none.quantized("0", "w2") is not none.quantized("0", "w2")


def test_unknown_schemes_say_what_is_offered(model: nn.Sequential) -> None:
    with pytest.raises(BadUnit, match="w<bits>"):
        weights_of(model).quantized("0", "v9")


def test_weights_that_are_not_finite_name_layer_and_scheme(model: nn.Sequential) -> None:
    weights = weights_of(model)
    model[2].weight.data[1, 2] = torch.nan
    with pytest.raises(NonFiniteWeights, match=r"2.*w3|w3.*2"):
        weights.quantized("2", "w3")
