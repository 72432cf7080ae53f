"""Seeing the inputs of a model's layers go by, at full precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from quant.layers import Layer
from sensitivity.tasks.task import Batch

Batches = Callable[[], Iterable[Batch]]


class Watcher(Protocol):
    """Sees the inputs of one layer go by."""

    @property
    def layer(self) -> Layer:
        """The layer; all its modules are watched."""

    def add(self, module: nn.Module, values: Tensor, real: Tensor | None) -> None:
        """One input of one of its modules; `real` (samples, tokens) is false for padding."""


def watch(model: nn.Module, watchers: Collection[Watcher], batches: Iterable[Batch]) -> None:
    """Run the model over the batches at full precision.

    The attention backend is fixed, so that the numbers are the same inside and outside of `gradients`.
    """
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            with _listening(model, watchers, _real_tokens(batch)):
                batch.call(model)


@contextmanager
def _listening(model: nn.Module, watchers: Iterable[Watcher], real: Tensor | None) -> Iterator[None]:
    hooks: list[Any] = []
    try:
        for found in watchers:
            modules = {id(m): m for m in (model.get_submodule(name) for name in found.layer.names)}
            hooks += [m.register_forward_pre_hook(_hook(found, real)) for m in modules.values()]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(found: Watcher, real: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.add(module, arguments[0].detach(), real)

    return hook


def _real_tokens(batch: Batch) -> Tensor | None:
    """True (samples, tokens) where a token is no padding; None where nothing says so."""
    mask = batch.inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def input_rows(module: nn.Module, values: Tensor, real: Tensor | None = None) -> Iterator[Tensor]:
    """What a module multiplies its weight with, as float32 (groups, rows, columns), one piece at a time.

    Padding tokens are left out where the leading sides are those of `real`.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        for image in torch.split(values, 1):
            yield _patches(module, image.float())
        return
    columns = values.shape[-1]
    if real is not None and values.shape[:-1].numel() == real.numel() and values.ndim in (2, 3):
        yield values.reshape(-1, columns)[real.reshape(-1).to(values.device)].float()[None]
    else:
        yield values.reshape(-1, columns).float()[None]


def _patches(module: nn.Conv1d | nn.Conv2d, values: Tensor) -> Tensor:
    """(1, channels, ...) -> (groups, positions, columns), padded as the module pads."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(values, module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv1d):
        padded = padded.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    unfolded = functional.unfold(padded, kernel, dilation=dilation, stride=stride)
    return unfolded.reshape(module.groups, -1, unfolded.shape[-1]).transpose(1, 2)


def groups_of(module: nn.Module) -> int:
    """How many groups of a module's output channels have input channels of their own."""
    return module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
