from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sensitivity.sketch import Sketch


def sketch_of(changes: Tensor, floats: int, seed: int = 0, batch: int = 7) -> np.ndarray:
    sketch = Sketch(len(changes), changes.shape[1], seed, floats)
    for rows in changes.split(batch):
        sketch.add(rows)
    return sketch.values


def changes(count: int, rows: int, outputs: int) -> list[Tensor]:
    """Changes with a common direction, so that inner products are far from 0."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(rows, outputs, generator=generator)
    return [common + torch.randn(rows, outputs, generator=generator) for _ in range(count)]


def exact_products(tensors: list[Tensor]) -> np.ndarray:
    flat = torch.stack(tensors).flatten(1).double().numpy()
    return flat @ flat.T


def test_few_outputs_are_kept_exactly() -> None:
    tensors = changes(4, 20, 5)
    sketches = np.stack([sketch_of(tensor, 100) for tensor in tensors])
    assert sketches.shape == (4, 100)
    np.testing.assert_allclose(sketches @ sketches.T, exact_products(tensors), rtol=1e-12)


@pytest.mark.parametrize(("rows", "outputs"), [(30, 200), (600, 40)])
def test_the_sketch_converges_to_the_exact_products(rows: int, outputs: int) -> None:
    """Errors shrink like 1 / sqrt(length), whether rows have their own bucket or share one."""
    tensors = changes(3, rows, outputs)
    exact = exact_products(tensors)
    errors = []
    for floats in (64, 1024):
        draws = [np.stack([sketch_of(t, floats, seed) for t in tensors]) for seed in range(40)]
        relative = [(s @ s.T - exact) / exact.diagonal().mean() for s in draws]
        assert np.abs(np.mean(relative, axis=0)).max() < 4 * np.std(relative, axis=0).max() / 40**0.5
        errors.append(np.std(relative))
    assert errors[0] < 2 / 64**0.5
    assert errors[1] < errors[0] / 2.5


def test_length_is_bounded() -> None:
    assert len(sketch_of(torch.ones(1000, 50), 2**10)) <= 2**10
    assert len(sketch_of(torch.ones(100, 5000), 2**10)) <= 2**10


def test_batches_do_not_matter_but_the_seed_does() -> None:
    tensor = changes(1, 40, 30)[0]
    exact = Sketch(40, 30, 0, 2000)
    assert exact.exact
    first = sketch_of(tensor, 256)
    np.testing.assert_array_equal(first, sketch_of(tensor, 256))
    assert not np.allclose(first, sketch_of(tensor, 256, seed=1))
