from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from quant.costs import CostError
from quant.devices import DEVICES
from quant.geometry import Geometry
from quant.latency import (
    Case,
    Timing,
    calls,
    case_of,
    cases,
    device_energy,
    measured_latency,
    roofline_latency,
    work,
)
from quant.layers import Layer
from quant.schemes import parse_scheme, parse_schemes


def layer(name="fc", matrix=(64, 256), op="linear", macs=None, dtype="float32"):
    shape = matrix if not op.startswith("conv") else (matrix[0], matrix[1] // 9, 3, 3)
    return Layer(name, op, shape, matrix, matrix[0] * matrix[1], macs, "other", (), dtype)


@pytest.mark.parametrize(
    ("scheme", "kernel", "group"),
    [
        ("w2", "int4_weight_only", 256),
        ("w4-asym", "int4_weight_only", 256),
        ("w4-g64", "int4_weight_only", 64),
        ("w3-g96", "int4_weight_only", 32),
        ("w4-g48", "dense", 0),
        ("w5", "int8_weight_only", 0),
        ("w8", "int8_weight_only", 0),
        ("w8-asym", "dense", 0),
        ("w8-g64", "dense", 0),
        ("w8-aint8", "int8_dynamic", 0),
        ("w4-aint8", "int8_dynamic", 0),
        ("w8-aint8s", "int8_dynamic", 0),
        ("w8-g64-aint8", "dense", 0),
        ("w8-aint4", "dense", 0),
        ("fp8-afp8", "dense", 0),
    ],
)
def test_a_scheme_runs_in_the_kernel_that_holds_it(scheme, kernel, group):
    case = case_of(layer(), parse_scheme(scheme), 3)
    assert case == Case(kernel, 64, 256, 3, "float32", group)


def test_other_layers_run_dequantized():
    assert case_of(layer(), None, 1).kernel == "dense"
    assert case_of(layer(op="embedding"), parse_scheme("w4"), 1).kernel == "embedding"
    assert case_of(layer(matrix=(60, 256)), parse_scheme("w4"), 1).kernel == "dense"
    convolution = layer(matrix=(8, 18), op="conv2d", macs=8 * 18 * 49)
    assert case_of(convolution, parse_scheme("w4"), 2) == Case("dense", 8, 18, 98, "float32")


def test_a_convolution_without_macs_is_named():
    with pytest.raises(CostError, match="MAC count for its latency. Got none for conv"):
        case_of(layer("conv", (8, 18), "conv2d"), parse_scheme("w4"), 1)


def test_weights_rotate_through_as_many_copies_as_fill_the_model():
    one = layer()
    assert case_of(one, None, 1, 20 * one.parameters).copies == 16
    assert case_of(layer(matrix=(16384, 16384)), None, 1, 2**40).copies == 1


def test_layers_of_one_shape_share_a_timing():
    layers = [layer("a"), layer("b"), layer("c", (64, 128))]
    menu = parse_schemes("w4,w8")
    found = cases(layers, menu, 1)
    assert len(found) == 4
    timings = {case.key: Timing(100.5 * (n + 1), 1.0, 9) for n, case in enumerate(found)}
    table = measured_latency(layers, menu, 1, timings)
    assert table["a"] == table["b"] == {"w4": Fraction(201, 2), "w8": 201}
    with pytest.raises(CostError, match="no timing of int4_weight_only:64x256"):
        measured_latency(layers, menu, 1, {})


def test_a_roofline_reads_packed_weights_and_counts_operations():
    kind, operations, traffic = work(layer(), parse_scheme("w4"), 2)
    assert (kind, operations) == ("float32", 2 * 64 * 256 * 2)
    assert traffic == 64 * 256 // 2 + 64 * 2 + 2 * (64 + 256) * 4
    assert work(layer(dtype="bfloat16"), parse_scheme("w4"), 2)[0] == "bfloat16"
    looked_up = work(layer(op="embedding"), parse_scheme("w8"), 2)
    assert looked_up == ("float32", 0, Fraction((64 * 256 + 128) * 2, 64) + 2 * 256 * 4)


def test_fewer_bits_are_faster_and_cheaper_while_memory_decides():
    big, menu = [layer(matrix=(4096, 4096))], parse_schemes("w2,w4,w8")
    for name, table in (
        ("latency", roofline_latency(big, menu, 1, DEVICES["h100"])),
        ("energy", device_energy(big, menu, 1, DEVICES["h100"])),
    ):
        row = table["fc"]
        assert row["w2"] < row["w4"] < row["w8"], name
    busy = roofline_latency(big, menu, 4096, DEVICES["h100"])["fc"]
    assert busy["w2"] == busy["w8"]


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w8", "bfloat16"),
        ("w8-aint8", "int8"),
        ("w4-aint4", "int8"),
        ("fp8-afp8", "float8"),
        ("bf16-aint8", "bfloat16"),
    ],
)
def test_a_roofline_computes_in_the_type_of_the_activations(scheme, kind):
    assert work(layer(dtype="bfloat16"), parse_scheme(scheme), 1)[0] == kind


MOE = Geometry(cached=1, windows=(None,), experts=8, active=2, hidden=256)


def experts(op="experts", shape=(8, 64, 256)):
    matrix = (shape[0] * 64, 256)
    return Layer("b.experts.gate_up_proj", op, shape, matrix, 8 * 64 * 256, None, "other", (), "float32")


@pytest.mark.parametrize("layer", [experts(), experts("experts_transposed", (8, 256, 64))])
def test_experts_run_one_by_one_with_their_share_of_the_tokens(layer):
    scheme = parse_scheme("w4")
    assert calls(layer, 1, MOE) == 2
    assert case_of(layer, scheme, 1, 0, MOE) == Case("int4_weight_only", 64, 256, 1, "float32", 256)
    assert case_of(layer, scheme, 64, 0, MOE).batch == 16
    (case,) = cases((layer,), (scheme,), 1, MOE)
    table = measured_latency((layer,), (scheme,), 1, {case.key: Timing(700, 1, 9)}, MOE)
    assert table == {layer.name: {"w4": Fraction(1400)}}


def test_experts_move_only_the_weights_that_are_used():
    scheme = parse_scheme("w8")
    kind, operations, moved = work(experts(), scheme, 1, MOE)
    stored = scheme.storage((8 * 64, 256)).bytes
    assert (kind, operations) == ("float32", 2 * 2 * 64 * 256)
    assert moved == Fraction(stored, 4) + 2 * (64 + 256) * 4
    many = work(experts(), scheme, 1000, MOE)
    assert many[1] == 1000 * operations
    assert stored <= many[2] - 2000 * (64 + 256) * 4 + 1 <= stored + 1


@pytest.mark.parametrize("geometry", [None, replace(MOE, active=0), replace(MOE, experts=4)])
def test_experts_of_an_unknown_number_are_named(geometry):
    for make in (roofline_latency, device_energy):
        with pytest.raises(CostError, match="num_experts_per_tok.*Got none for the 8 of b.experts"):
            make((experts(),), parse_schemes("w4"), 1, DEVICES["h100"], geometry)
    with pytest.raises(CostError, match="Send a table"):
        cases((experts(),), parse_schemes("w4"), 1, geometry)
