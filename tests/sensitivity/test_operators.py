from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sensitivity.gradients import gradients
from sensitivity.operators import BlockHessian


def explicit_hessian(loss: Any, parameter: Tensor) -> Tensor:
    """Column by column, by the textbook."""
    size = parameter.numel()
    return torch.autograd.functional.hessian(loss, parameter.detach()).reshape(size, size)


@pytest.mark.parametrize("vectorized", [False, True])
def test_products_are_those_of_the_explicit_hessian(vectorized: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.tanh(inputs @ w.T), torch.arange(7) % 4)

    vectors = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    products = BlockHessian(loss(weight), weight, vectorized=vectorized)(vectors)
    torch.testing.assert_close(products, vectors @ explicit_hessian(loss, weight))


def test_attention_of_a_llama_is_differentiated_twice(tiny: Any) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny("llama").folder).requires_grad_(False)
    assert model.config._attn_implementation == "sdpa"
    tokens = torch.arange(24).view(2, 12) + 3
    name = "model.layers.0.self_attn.k_proj.weight"
    weight = model.get_parameter(name)

    def loss(value: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {name: value}, (tokens,))
        return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    with gradients([weight]):
        products = BlockHessian(loss(weight), weight)(torch.eye(weight.numel()))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(products, explicit_hessian(loss, weight), rtol=1e-3, atol=1e-6)
    assert products.norm() > 1e-3


def test_a_loss_without_the_parameter_has_a_zero_block() -> None:
    used, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    for loss in ((used**2).sum(), torch.tensor(1.0), unused.sum()):
        assert BlockHessian(loss, unused)(torch.ones(1, 2)).tolist() == [[0.0, 0.0]]


def test_bad_shapes_are_refused() -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="loss must be a scalar"):
        BlockHessian(weight**2, weight)
    with pytest.raises(ValueError, match=r"vectors must be \(m, 2\). Got \(2,\)"):
        BlockHessian((weight**2).sum(), weight)(torch.ones(2))


def test_gradients_are_dropped_as_they_are_used() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).requires_grad_(False)
    weights = [model[0].weight, model[2].weight]
    seen: dict[int, np.ndarray] = {}

    def contract(index: int, gradient: Tensor) -> None:
        seen[index] = gradient.clone().numpy()
        held = [weight for weight in weights if weight.grad is not None]
        assert len(held) == 1

    with gradients(weights, contract):
        expected = torch.autograd.grad(model(torch.ones(2, 3)).sum(), weights)
        model(torch.ones(2, 3)).sum().backward()
    assert sorted(seen) == [0, 1]
    for index, gradient in enumerate(expected):
        np.testing.assert_allclose(seen[index], gradient.numpy())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_gradients_are_switched_off_after_an_error() -> None:
    weight = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(KeyError), gradients([weight], lambda index, gradient: None):
        raise KeyError
    assert not weight.requires_grad
    weight.requires_grad_(True)
    weight.sum().backward()
    assert weight.grad is not None
