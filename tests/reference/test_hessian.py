"""Hutchinson and HAWQ-V2's omega against the exact Hessian of a small trained CNN."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, cross_entropy, linear, softplus

from quant.formats import IntegerFormat
from quant.packing import decode
from quant.quantizers.rtn import quantize
from sensitivity.estimators import mean_estimate, quadratic_forms, rademacher
from sensitivity.operators import BlockHessian

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "hessian"
WEIGHTS = ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")
PARAMETERS = (*WEIGHTS, "conv1.bias", "bn.weight", "bn.bias", "conv2.bias", "fc1.bias", "fc2.bias")
SEEDS, PROBES = 200, 100

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/reference/hessian"),
]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((FOLDER / "tiny_cnn_expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    with np.load(FOLDER / "tiny_cnn.npz") as arrays:
        return {name.replace("__", "."): torch.as_tensor(arrays[name]) for name in arrays}


def loss_of(data: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the CNN that expected.json describes, in float64."""
    hidden = conv2d(data["X"], data["conv1.weight"], data["conv1.bias"], stride=2, padding=1)
    statistics = (data["bn.running_mean"], data["bn.running_var"])
    hidden = softplus(batch_norm(hidden, *statistics, data["bn.weight"], data["bn.bias"]))
    hidden = softplus(conv2d(hidden, data["conv2.weight"], data["conv2.bias"], stride=2, padding=1))
    hidden = adaptive_avg_pool2d(hidden, 2).flatten(1)
    hidden = torch.tanh(linear(hidden, data["fc1.weight"], data["fc1.bias"]))
    return cross_entropy(linear(hidden, data["fc2.weight"], data["fc2.bias"]), data["Y"])


def block(data: dict[str, Tensor], name: str) -> BlockHessian:
    """The Hessian block of one parameter, by double backward."""
    parameter = data[name].clone().requires_grad_(True)
    return BlockHessian(loss_of({**data, name: parameter}), parameter, vectorized=True)


def exact_block(data: dict[str, Tensor], name: str) -> Tensor:
    return block(data, name)(torch.eye(data[name].numel(), dtype=torch.float64))


def probes(name: str, size: int, seed: int) -> Tensor:
    return torch.from_numpy(np.stack([rademacher(size, (seed, name, index)) for index in range(PROBES)]))


def forms_of_all_seeds(data: dict[str, Tensor], name: str) -> np.ndarray:
    """z'Hz (seeds, probes), each product a Hessian-vector product of the network."""
    operator, size = block(data, name), data[name].numel()
    batches: Iterator[Tensor] = (probes(name, size, seed) for seed in range(SEEDS))
    return np.stack([quadratic_forms(operator, batch) for batch in batches])


def test_the_network_is_the_published_one(data: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert loss_of(data).item() == pytest.approx(expected["loss"], rel=1e-9)


@pytest.mark.parametrize("name", PARAMETERS)
def test_products_give_the_exact_block(name: str, data: dict[str, Tensor], expected: dict[str, Any]) -> None:
    hessian, known = exact_block(data, name), expected["per_parameter"][name]
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-10)
    assert hessian.trace().item() == pytest.approx(known["trace"], rel=1e-8)
    assert hessian.norm().item() == pytest.approx(known["frob"], rel=1e-8)
    assert torch.linalg.eigvalsh(hessian)[-1].item() == pytest.approx(known["top_eig"], rel=1e-8)


@pytest.mark.parametrize("name", WEIGHTS)
def test_intervals_cover_the_exact_trace(
    name: str, data: dict[str, Tensor], expected: dict[str, Any]
) -> None:
    known = expected["per_parameter"][name]
    forms = forms_of_all_seeds(data, name)
    estimates = [mean_estimate(of_seed) for of_seed in forms]
    covered = [abs(e.value - known["trace"]) <= 1.96 * e.stderr for e in estimates]
    assert 0.91 <= np.mean(covered) <= 0.985
    assert {e.n for e in estimates} == {PROBES}
    assert forms.mean() == pytest.approx(known["trace"], abs=4 * forms.std() / forms.size**0.5)
    assert forms.var() == pytest.approx(known["rademacher_variance"], rel=0.06)


def test_the_variance_of_a_masked_probe_is_twice_the_squares_off_the_diagonal(
    data: dict[str, Tensor], expected: dict[str, Any]
) -> None:
    for name in PARAMETERS:
        hessian = exact_block(data, name)
        variance = 2 * (hessian.square().sum() - hessian.diagonal().square().sum())
        assert variance.item() == pytest.approx(
            expected["per_parameter"][name]["rademacher_variance"], rel=1e-7
        )


@pytest.mark.parametrize("name", WEIGHTS)
def test_omega_is_exact(name: str, data: dict[str, Tensor], expected: dict[str, Any]) -> None:
    weight = data[name]
    average = exact_block(data, name).trace().item() / weight.numel()
    for bits, known in expected["omega"][name].items():
        error = round_to_nearest(weight, int(bits)) - weight
        assert error.square().sum().item() == pytest.approx(known["delta_sq"], rel=1e-9)
        omega = average * error.square().sum().item()
        assert omega == pytest.approx(known["hawq_v2_omega"], rel=1e-7)


@pytest.mark.parametrize("name", WEIGHTS)
def test_our_quantizer_gives_the_published_errors(
    name: str, data: dict[str, Tensor], expected: dict[str, Any]
) -> None:
    """Scales are stored as float32, so errors agree to about seven digits."""
    matrix = data[name].flatten(1).float()
    for bits, known in expected["omega"][name].items():
        fmt = IntegerFormat(
            int(bits), symmetric=True, granularity="channel", group_size=None, scale_type="float32"
        )
        error = decode(quantize(matrix, fmt)).double() - matrix.double()
        assert error.square().sum().item() == pytest.approx(known["delta_sq"], rel=1e-4)


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Symmetric, per output channel, scale = max|w| / (2^(b-1) - 1), as expected.json states."""
    most = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1)) / most
    return (weight / scale).round().clamp(-most - 1, most) * scale
