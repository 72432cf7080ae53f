"""Structural similarity against its definition, window by window in plain Python floats."""

from __future__ import annotations

from itertools import product
from statistics import fmean, variance

import pytest
import torch
from torch import Tensor

from sensitivity.structural_similarity import structural_similarity

GENERATOR = torch.Generator().manual_seed(0)


def naive(x: Tensor, y: Tensor, side: int) -> float:
    """One image (channels, height, width): Wang et al. 2004, equation 13, averaged over windows and channels."""
    x, y = x.double(), y.double()
    span = float(x.max() - x.min())
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    values = []
    for channel, top, left in product(
        range(x.shape[0]), range(x.shape[1] - side + 1), range(x.shape[2] - side + 1)
    ):
        a, b = (image[channel, top : top + side, left : left + side].flatten().tolist() for image in (x, y))
        mean_a, mean_b = fmean(a), fmean(b)
        covariance = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / (len(a) - 1)
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        values.append(luminance * (2 * covariance + c2) / (variance(a) + variance(b) + c2))
    return fmean(values)


@pytest.mark.parametrize(("shape", "side"), [((1, 8, 8), 7), ((2, 9, 12), 7), ((3, 6, 9), 5), ((1, 3, 4), 3)])
@pytest.mark.parametrize("noise", [0.01, 0.5, 3.0])
def test_it_is_the_mean_over_windows_of_the_definition(
    shape: tuple[int, ...], side: int, noise: float
) -> None:
    x = 5 * torch.randn(3, *shape, generator=GENERATOR) + 2
    y = x + noise * torch.randn(x.shape, generator=GENERATOR)
    expected = [naive(a, b, side) for a, b in zip(x, y, strict=True)]
    assert structural_similarity(x, y).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_equal_images_score_one_at_any_scale_even_flat_ones(scale: float) -> None:
    x = scale * torch.randn(2, 1, 8, 8, generator=GENERATOR)
    assert structural_similarity(x, x).tolist() == pytest.approx([1, 1])
    flat = torch.zeros(1, 1, 8, 8)
    assert structural_similarity(flat, flat).tolist() == [1.0]


def test_structure_counts_where_squared_errors_are_equal() -> None:
    """A shift of all pixels and noise of the same squared error: the shift keeps the structure."""
    x = torch.rand(1, 1, 16, 16, generator=GENERATOR)
    noise = torch.randn(x.shape, generator=GENERATOR)
    shifted, noisy = x + 0.2, x + noise * 0.2 / noise.square().mean().sqrt()
    assert float(structural_similarity(x, shifted)) > float(structural_similarity(x, noisy)) + 0.05
