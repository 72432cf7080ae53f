"""Images whose batch statistics are those that a model's batch norms remember (ZeroQ, Cai et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sensitivity.calibration import is_half, placement
from sensitivity.errors import BadCalibration
from sensitivity.estimators import keyed_generator
from sensitivity.gradients import gradients
from sensitivity.tasks.task import first_tensor
from sensitivity.units import MakeUnit

STEPS = 300
RATE = 0.1


class BatchNormImages:
    """Adam on a batch of images, from normal noise: sum over batch norms of the squared distances of mean and
    of standard deviation, and the same for the images themselves, which should have mean 0 and deviation 1.
    All in float32, whatever precision the model is in.
    """

    def make(self, model: nn.Module, unit: MakeUnit) -> dict[str, Tensor]:
        """`pixel_values` (samples, channels, height, width). Raises BadCalibration for a model without batch
        norms, for a shape that the model does not take, and where no finite images were found.
        """
        precise = _precise(model)
        norms = [
            module for module in precise.modules() if isinstance(module, _BatchNorm) and _remembers(module)
        ]
        if not norms:
            raise BadCalibration(
                "batch_norm_images needs a model with batch norms. Got none. Use random_tokens or"
                " generated_tokens for language models, or send data."
            )
        shape = _shape(model, unit)
        device, dtype = placement(precise)
        noise = keyed_generator((unit.seed, "batch_norm_images", unit.start)).standard_normal(
            (unit.stop - unit.start, *shape)
        )
        images = torch.from_numpy(noise).to(device, dtype)
        with gradients(()), _inputs_of(norms) as seen:
            found = _fit(precise, images.clone().requires_grad_(), norms, seen).cpu()
        if not bool(torch.isfinite(found).all()):
            raise BadCalibration(
                "images must be found whose statistics are those of the batch norms. Got NaN or infinity."
                " Check the model's weights and running statistics, or send data."
            )
        return {"pixel_values": found}


def statistics_loss(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Squared distance of the batch's mean and deviation per channel (channels,) from those given.

    `values` is (samples, channels, ...).

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> float(statistics_loss(x, torch.tensor([2.0]), torch.tensor([1.0])))
    0.0
    """
    flat = values.transpose(0, 1).flatten(1)
    found = flat.std(1, unbiased=False)
    return ((flat.mean(1) - mean) ** 2).sum() + ((found - deviation) ** 2).sum()


def _fit(model: nn.Module, images: Tensor, norms: list[_BatchNorm], seen: dict[int, Tensor]) -> Tensor:
    optimizer = torch.optim.Adam([images], lr=RATE)
    own = torch.zeros(images.shape[1], device=images.device, dtype=images.dtype)
    for _ in range(STEPS):
        optimizer.zero_grad()
        seen.clear()
        _run(model, images)
        loss = statistics_loss(images, own, own + 1)
        for number, norm in enumerate(norms):
            if number in seen and norm.running_mean is not None and norm.running_var is not None:
                deviation = (norm.running_var + norm.eps).sqrt()
                loss = loss + statistics_loss(seen[number], norm.running_mean, deviation)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return images.detach()


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        first_tensor(model(images))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise BadCalibration(
            f"the model must take images of shape {list(images.shape[1:])}. Got {type(error).__name__}:"
            f" {error!s:.200}. Give its channels, height and width."
        ) from error


@contextmanager
def _inputs_of(norms: list[_BatchNorm]) -> Iterator[dict[int, Tensor]]:
    """What each batch norm was given last, by its place in the list."""
    seen: dict[int, Tensor] = {}

    def keep(number: int, values: Tensor) -> None:
        seen[number] = values

    handles = [
        norm.register_forward_pre_hook(lambda _, inputs, number=number: keep(number, inputs[0]))
        for number, norm in enumerate(norms)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _precise(model: nn.Module) -> nn.Module:
    """The model, or a copy of it in float32: Adam's squares of half precision gradients vanish."""
    return deepcopy(model).float() if is_half(model) else model


def _remembers(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _shape(model: nn.Module, unit: MakeUnit) -> tuple[int, ...]:
    """Channels, height and width: as asked, or as the configuration says."""
    if unit.shape:
        return unit.shape
    config = getattr(model, "config", None)
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if not isinstance(side, int) or not isinstance(channels, int):
        raise BadCalibration(
            "the shape of the images must be known. Got a model whose configuration has no image_size."
            " Give channels, height and width, for example 3,224,224."
        )
    return channels, side, side
