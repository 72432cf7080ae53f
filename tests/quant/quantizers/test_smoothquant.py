import pytest
import torch
from torch import nn

from quant.adjusted import dequantized
from quant.apply import fake_quantized
from quant.codecs.activations import round_input
from quant.inputs import InputsError, LayerInputs
from quant.inventory import take_inventory
from quant.layers import Layer
from quant.quantizers import mse_clip
from quant.quantizers.smoothquant import migration
from quant.schemes import Scheme, SchemeError, parse_scheme


def matrix_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def samples_of(columns, seed=1):
    """Inputs with two columns that are 40 times as large."""
    samples = matrix_of(256, columns, seed)
    samples[:, [3, 17]] *= 40
    return samples


def statistics(samples):
    moments = (samples.T @ samples / len(samples))[None]
    return LayerInputs(moments, len(samples), samples.abs().amax(dim=0))


def test_half_the_way_the_maxima_of_inputs_and_weights_are_equal():
    matrix, known = matrix_of(24, 32), statistics(samples_of(32))
    scales = migration(matrix, known, 50).scales.float()
    weights = (matrix * scales).abs().amax(dim=0)
    ratio = weights / (known.largest / scales)
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(32), atol=5e-3, rtol=0)
    assert scales.log().mean().abs() < 1e-3


def test_the_share_moves_the_burden_from_inputs_to_weights():
    matrix, known = matrix_of(24, 32), statistics(samples_of(32))
    spreads = [
        (known.largest / migration(matrix, known, percent).scales).log().std() for percent in (10, 50, 90)
    ]
    assert spreads[2] < spreads[1] < spreads[0]


def test_columns_without_inputs_or_weights_are_left_alone():
    matrix, samples = matrix_of(8, 20), samples_of(20)
    matrix[:, 4], samples[:, 9] = 0, 0
    scales = migration(matrix, statistics(samples), 50).scales
    assert scales[[4, 9]].tolist() == [1, 1]
    none = LayerInputs(torch.zeros(1, 20, 20), 0, torch.zeros(20))
    assert (migration(matrix, none, 50).scales == 1).all()


def test_statistics_without_magnitudes_are_refused():
    known = LayerInputs(torch.eye(8)[None], 4)
    with pytest.raises(InputsError, match="must hold the largest input of each column"):
        migration(matrix_of(4, 8), known, 50)


def test_the_stored_matrix_is_the_multiplied_one():
    matrix, known = matrix_of(8, 32), statistics(samples_of(32))
    scheme = parse_scheme("w4-smoothquant-aint8")
    result = scheme.load()(matrix, scheme.weight, known)
    scales = migration(matrix, known, 50).scales.float()
    assert torch.equal(
        dequantized(result.stored), dequantized(mse_clip.quantize(matrix * scales, scheme.weight))
    )
    assert torch.equal(dequantized(result), dequantized(result.stored) / scales)


@pytest.mark.parametrize("activation", ["int8", "int8s", "int4", "fp8s"])
def test_a_layer_multiplies_divided_inputs_with_multiplied_weights(activation):
    torch.manual_seed(0)
    model, samples = nn.Sequential(nn.Linear(32, 16)), samples_of(32)
    inventory, known = take_inventory(model, include=["*"]), statistics(samples)
    scheme = parse_scheme(f"w8-smoothquant-a{activation}")
    original = model[0].weight.detach().clone()
    scales = migration(original, known, 50).scales.float()
    limit = float((known.largest / scales).amax()) if scheme.activation.static else None
    inner = round_input(samples / scales, scheme.activation, "linear", limit)
    stored = dequantized(scheme.load()(original, scheme.weight, known).stored)
    with torch.no_grad(), fake_quantized(model, {"0": scheme}, inventory, lambda name: known):
        found = model(samples)
    torch.testing.assert_close(found, inner @ stored.T + model[0].bias, rtol=1e-4, atol=1e-3)
    assert torch.equal(model[0].weight, original)


def test_it_pays_where_columns_of_the_input_are_large():
    torch.manual_seed(0)
    model, samples = nn.Sequential(nn.Linear(64, 48)), samples_of(64)
    inventory, known = take_inventory(model, include=["*"]), statistics(samples)
    with torch.no_grad():
        exact = model(samples)
        errors = {}
        for name in ("w8-aint8", "w8-smoothquant-aint8", "w8-gptq-smoothquant75-aint8"):
            with fake_quantized(model, {"0": name}, inventory, lambda name: known):
                errors[name] = float((model(samples) - exact).square().mean())
    plain, half, more = errors.values()
    assert half < 0.1 * plain
    assert more < 0.2 * plain


@pytest.mark.parametrize(
    ("text", "name", "spelled"),
    [
        ("w8-smoothquant-aint8", "w8-smoothquant-aint8", "mse_clip-smoothquant50-aint8"),
        ("w8-smoothquant50-aint8", "w8-smoothquant-aint8", "mse_clip-smoothquant50-aint8"),
        ("w8-aint8s-smoothquant75-gptq", "w8-gptq-smoothquant75-aint8s", "gptq-smoothquant75-aint8s"),
        ("fp8-smoothquant-afp8", "fp8-smoothquant-afp8", "fp8-channel-float32-mse_clip-smoothquant50-afp8"),
    ],
)
def test_the_share_is_spelled_in_percent(text, name, spelled):
    scheme = parse_scheme(text)
    assert scheme.name == name
    assert scheme.spelled.endswith(spelled)
    assert parse_scheme(name) == parse_scheme(scheme.spelled) == scheme
    assert scheme.needs_inputs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8-smoothquant", "must be part of a scheme that rounds activations. Got none"),
        ("w8-smoothquant100-aint8", "with a number from 1 to 99. Got 'smoothquant100'"),
        ("q4_0-smoothquant-aint8", "must support the format family 'gguf'"),
    ],
)
def test_schemes_that_do_not_fit_are_refused(text, message):
    with pytest.raises(SchemeError, match=message):
        parse_scheme(text)


def test_it_is_for_layers_whose_inputs_are_features():
    scheme = parse_scheme("w8-smoothquant-aint8")
    assert "no features" in scheme.refuses(layer("conv2d", (8, 3, 3, 3), (8, 27)))
    assert scheme.refuses(layer("linear", (8, 32), (8, 32))) is None
    assert scheme.storage((8, 32)).added_bits == 16 * 32
    assert scheme.storage((8, 32)).bytes == Scheme(scheme.weight).storage((8, 32)).bytes + 64


def layer(op, shape, matrix):
    return Layer("x", op, shape, matrix, matrix[0] * matrix[1], None, "other", (), "float32")
