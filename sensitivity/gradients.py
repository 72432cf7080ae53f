"""Gradients of chosen weights: taken one at a time, dropped at once, differentiable twice if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Contract = Callable[[int, Tensor], None]


@contextmanager
def gradients(parameters: Sequence[nn.Parameter], contract: Contract | None = None) -> Iterator[None]:
    """Inside, only `parameters` need gradients, and attention uses the one backend with a double backward.

    `contract(i, g)` is called with the gradient of parameter i as soon as a backward pass knows it; then it
    is dropped, so no more than one is held. On exit no parameter needs or holds a gradient.
    """
    hooks: list[Any] = []
    try:
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(True)
            if contract is not None:
                hooks.append(_on_gradient(parameter, index, contract))
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _on_gradient(parameter: nn.Parameter, index: int, contract: Contract) -> Any:
    def hook(owner: Tensor) -> None:
        if owner.grad is not None:
            contract(index, owner.grad)
        owner.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
