"""Structural similarity of images (Wang, Bovik, Sheikh and Simoncelli 2004), uniform windows."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 7
"""Side of the window in pixels; on smaller images the largest odd side that fits."""
K1, K2 = 0.01, 0.03


def structural_similarity(reference: Tensor, other: Tensor) -> Tensor:
    """Mean over windows and channels of each image's similarity (n,), 1 where equal, in float64.

    Images are (n, channels, height, width). Windows lie wholly inside; variances are those of samples; the
    dynamic range is the reference image's own. As `skimage.metrics.structural_similarity` with its defaults.
    """
    x, y = reference.double(), other.double()
    side = min(WINDOW, *(2 * ((size + 1) // 2) - 1 for size in x.shape[2:]))
    span = (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))[:, None, None, None].clamp(min=torch.finfo(x.dtype).tiny)
    # Only ratios count: a range of 1 keeps the constants away from underflow.
    x, y = x / span, y / span
    c1, c2 = K1**2, K2**2
    mean_x, mean_y = _means(x, side), _means(y, side)
    unbiased = side**2 / max(1, side**2 - 1)
    var_x = unbiased * (_means(x * x, side) - mean_x**2)
    var_y = unbiased * (_means(y * y, side) - mean_y**2)
    covariance = unbiased * (_means(x * y, side) - mean_x * mean_y)
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def _means(images: Tensor, side: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, side, stride=1)
