"""Noise predictors of diffusion models: one denoising step per sample, compared with full precision's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sensitivity.calibration_check import SIGNAL
from sensitivity.errors import BadCalibration, BadModel, MetricNotOffered
from sensitivity.scorers.sqnr import LOSSLESS_DB
from sensitivity.structural_similarity import structural_similarity
from sensitivity.tasks.generic import Generic
from sensitivity.tasks.task import (
    Batch,
    Outputs,
    PerSample,
    at_least_float32,
    first_tensor,
    one_row_per_sample,
)

NOISY = ("sample", "hidden_states")
"""What the classes of diffusers call the noisy image."""


class Diffusion(Generic):
    """The predicted noise, one flat row per sample, without variances that some models predict beside it.

    Divergence is the relative error of the predicted noise. Labels are the true noise.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """The predicted noise (size, channels x height x width)."""
        predicted, noisy = first_tensor(batch.call(model), ("sample",)), noisy_images(batch)
        if predicted.ndim != 4 or predicted.shape[2:] != noisy.shape[2:]:
            raise BadModel(
                "the model must return images of the size it is given, (samples, channels, height, width). "
                f"Got {tuple(predicted.shape)} for {tuple(noisy.shape)}."
            )
        channels = min(predicted.shape[1], noisy.shape[1])
        return one_row_per_sample(predicted[:, :channels].flatten(1), batch.size)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean squared error of the predicted noise. Raises MetricNotOffered without the true noise."""
        return self._squared_errors(outputs, batch).mean()

    def losses(self, outputs: Outputs, batch: Batch) -> PerSample:
        """Mean squared error of each sample. Raises MetricNotOffered without the true noise."""
        return outputs.sums(self._squared_errors(outputs, batch))

    def quality(self, outputs: Outputs, batch: Batch, reference: Outputs) -> Mapping[str, PerSample]:
        """Structural similarity of the images and decibels of signal to noise, against full precision."""
        similar = structural_similarity(images(reference, batch), images(outputs, batch))
        errors = reference.sums((outputs.rows - reference.rows).double().square().sum(-1))
        signal = reference.sums(reference.rows.double().square().sum(-1))
        least = signal * 10 ** (-LOSSLESS_DB / 10) + np.finfo(np.float64).tiny
        decibels = 10 * np.log10(np.maximum(signal, least) / np.maximum(errors, least))
        return {"ssim": reference.sums(similar), "sqnr": decibels}

    def check(self, batch: Batch, width: int | None = None) -> None:
        """Noisy images as (samples, channels, height, width); true noise of their shape; signal in (0, 1]."""
        noisy, labels, signal = noisy_images(batch), batch.labels, batch.extras.get(SIGNAL)
        if labels is not None and (not labels.is_floating_point() or labels.shape != noisy.shape):
            raise BadCalibration(
                f"labels must be the true noise, numbers of shape {tuple(noisy.shape)}. "
                f"Got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        if signal is None:
            return
        if signal.ndim != 1 or not signal.is_floating_point():
            raise BadCalibration(f"{SIGNAL} must be one number per sample. Got shape {tuple(signal.shape)}.")
        for row in ((signal <= 0) | (signal > 1)).nonzero()[:1, 0].tolist():
            raise BadCalibration(
                f"{SIGNAL} must be above 0 and at most 1. Got {float(signal[row])} in row {row}."
            )

    def _squared_errors(self, outputs: Outputs, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise MetricNotOffered("a loss needs the true noise. Got none: add a tensor named labels.")
        truth = batch.labels[:, : outputs.rows.shape[1] // batch.labels[0, 0].numel()].flatten(1)
        return (outputs.rows - truth.to(outputs.rows)).square().mean(-1)


def noisy_images(batch: Batch) -> Tensor:
    """The noisy images of a batch. Raises BadCalibration where there are none."""
    name = batch.positional or next((name for name in NOISY if name in batch.inputs), None)
    found = batch.inputs.get(name or "")
    if found is None or found.ndim != 4 or not found.is_floating_point():
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.inputs.items())
        raise BadCalibration(
            f"noisy images must be named {' or '.join(NOISY)}, numbers of shape (samples, channels, height, "
            f"width). Got {got}."
        )
    return found


def images(outputs: Outputs, batch: Batch) -> Tensor:
    """What structural similarity looks at (size, channels, height, width): the clean images that the noise
    leaves where the data say how much of each sample is signal, else the predicted noise itself.
    """
    noisy = at_least_float32(noisy_images(batch))
    predicted = outputs.rows.reshape(batch.size, -1, *noisy.shape[2:])
    if SIGNAL not in batch.extras:
        return predicted
    signal = batch.extras[SIGNAL].to(predicted)[:, None, None, None]
    clean: Tensor = (noisy[:, : predicted.shape[1]] - torch.sqrt(1 - signal) * predicted) / torch.sqrt(signal)
    return clean
