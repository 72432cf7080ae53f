"""Tensors beside the weights that make up for what quantizing changes on average.

bias         Nagel et al. 2019, arXiv:1906.04721, section 4.2: a layer whose weights miss by dW shifts its
             outputs by dW E[x]; the bias takes that back.
batch_norm   Statistics re-estimated after quantizing, as AdaQuant's batch-norm tuning does (Hubara et al.
             2021, arXiv:2006.10518): here, only the change that quantizing brings is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant.ops import to_matrix

MULTIPLIES = ("linear", "conv1d", "conv2d", "transformers_conv1d")
"""Kinds of layers that add a bias to what they multiply."""
Statistics = dict[str, tuple[Tensor, Tensor]]
"""Path of a batch norm -> mean and variance of its inputs, per channel."""


def bias_of(model: nn.Module, path: str, op: str) -> nn.Parameter | None:
    """The bias that a layer's module adds; None where it has none, or shares it."""
    if op not in MULTIPLIES:
        return None
    bias = getattr(model.get_submodule(path), "bias", None)
    if not isinstance(bias, nn.Parameter):
        return None
    users = sum(other is bias for _, other in model.named_parameters(remove_duplicate=False))
    return bias if users == 1 else None


def corrected_bias(bias: Tensor, weight: Tensor, quantized: Tensor, op: str, means: Tensor) -> Tensor:
    """bias + (W - W_q) E[x], in the bias's type; `means` is (groups, columns) as LayerInputs splits them."""
    error = to_matrix(weight.detach().float() - quantized.float(), op)
    split = error.reshape(len(means), -1, error.shape[1])
    shift = torch.einsum("grc,gc->gr", split, means.to(split)).reshape(-1)
    return (bias.detach().float() + shift).to(bias.dtype)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every batch norm that keeps statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    found = {path: m for path, m in model.named_modules() if isinstance(m, kinds)}
    return {path: m for path, m in found.items() if isinstance(m.running_mean, Tensor)}


def input_statistics(model: nn.Module, run: Callable[[], None]) -> Statistics:
    """What batch norms see while `run` passes data through the model, each batch normalized by its own.

    Means over batches. The model's own statistics are the very same tensors afterwards. Raises ValueError
    when a batch has a single value per channel.
    """
    modules = batch_norms(model)
    names = ("running_mean", "running_var", "num_batches_tracked", "momentum", "training")
    kept = {path: {name: getattr(module, name) for name in names} for path, module in modules.items()}
    try:
        for module in modules.values():
            for name in names[:3]:
                setattr(module, name, torch.zeros_like(getattr(module, name)))
            module.momentum, module.training = None, True  # type: ignore[assignment]
        run()
        return {path: (m.running_mean, m.running_var) for path, m in modules.items()}  # type: ignore[misc]
    finally:
        for path, module in modules.items():
            for name, value in kept[path].items():
                setattr(module, name, value)


def corrected_statistics(model: nn.Module, full: Statistics, quantized: Statistics) -> dict[str, Tensor]:
    """Buffers of every batch norm whose inputs quantizing changes: means move by as much, variances scale."""
    found: dict[str, Tensor] = {}
    for path, module in batch_norms(model).items():
        (mean, variance), (new_mean, new_variance) = full[path], quantized[path]
        factor = torch.where(variance > 0, new_variance / variance, 1.0)
        found[f"{path}.running_mean"] = module.running_mean + (new_mean - mean)  # type: ignore[operator]
        found[f"{path}.running_var"] = module.running_var * factor  # type: ignore[operator]
    return found


@contextmanager
def replaced_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other parameters and buffers, by their names, while the block runs.

    Afterwards it holds the very same tensors. Raises AttributeError for a name that it has not.
    """
    own = [_place(model, name) for name in tensors]
    kept = [tensor.data for tensor in own]
    try:
        for tensor, new in zip(own, tensors.values(), strict=True):
            tensor.data = new
        yield
    finally:
        for tensor, data in zip(own, kept, strict=True):
            tensor.data = data


def _place(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), attribute)
    return found
