from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.activations import ACTIVATIONS, KINDS, ActivationFormat
from quant.costs import bops
from quant.formats import FORMATS
from quant.layers import Inventory, Layer
from quant.lint import lint
from quant.plan import Calibration, Certificate, Digests, parse_plan, plan_json
from quant.planning import build_plan
from quant.runtimes import RUNTIMES
from quant.schemes import Scheme, SchemeError, parse_scheme

LAYER = Layer("fc", "linear", (64, 128), (64, 128), 8192, 8192, "other", (), "float32")
CALIBRATION = Calibration("causal_lm", 8, 16, 0, 4, "cpu")
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
weights = st.sampled_from([fmt for family in FORMATS.values() for fmt in family.examples])


def plan_for(scheme, runtime=None, layer=LAYER):
    return build_plan(
        Inventory((layer,), (), layer.parameters, 0),
        {layer.name: scheme},
        digests=Digests(),
        certificate=Certificate("optimal"),
        source="test",
        runtime=runtime,
        calibration=CALIBRATION,
    )


@given(weights, st.sampled_from([None, *ACTIVATIONS.values()]), st.sampled_from(["mse_clip", "rtn"]))
def test_every_scheme_reads_back_from_both_spellings(weight, activation, quantizer):
    scheme = Scheme(weight, quantizer, activation)
    assert parse_scheme(scheme.name) == parse_scheme(scheme.spelled) == scheme
    assert scheme.as_json()["activation"] == (None if activation is None else activation.name)
    assert scheme.weight_bits == weight.weight_bits


@every_activation
def test_a_static_scale_is_stored_and_counted(name):
    plain, scheme = parse_scheme("w8"), parse_scheme(f"w8-a{name}")
    more = scheme.storage(LAYER.matrix).bytes - plain.storage(LAYER.matrix).bytes
    assert more == (4 if name.endswith("s") else 0)
    assert plan_for(scheme).totals.bytes == plan_for(plain).totals.bytes + more


@every_activation
def test_bops_are_weight_bits_times_activation_bits(name):
    assert bops(LAYER, parse_scheme(f"w4-a{name}")) == LAYER.macs * 4 * ACTIVATIONS[name].bits
    assert bops(LAYER, parse_scheme("w4")) == LAYER.macs * 4 * 32


@every_activation
def test_a_plan_keeps_the_activations_and_says_how_data_were_read(name):
    plan = plan_for(f"w4-a{name}")
    assert parse_plan(plan_json(plan)) == plan
    assert plan.assignment == {"fc": f"w4-a{name}"}
    assert (plan.calibration == CALIBRATION) == name.endswith("s")


@every_activation
def test_embeddings_and_unknown_operations_refuse_activations(name):
    embedding = replace(LAYER, op="embedding")
    assert "multiplies no activations" in parse_scheme(f"w4-a{name}").refuses(embedding)
    assert "has no such kernel" in ACTIVATIONS[name].refuses("lookup", 64)
    assert parse_scheme(f"w4-a{name}").refuses(LAYER) is None


def test_blocks_refuse_columns_and_operations_that_do_not_fit():
    odd, conv = replace(LAYER, matrix=(128, 40)), replace(LAYER, op="conv2d")
    for name, kind in KINDS.items():
        scheme = parse_scheme(f"w4-a{name}")
        assert (scheme.refuses(odd) is None) == (kind.block == 0)
        assert (scheme.refuses(conv) is None) == (kind.block == 0)


def test_unknown_kinds_and_static_blocks_are_refused():
    with pytest.raises(SchemeError, match="Activation must be one of int8, int4"):
        ActivationFormat("int5")
    with pytest.raises(SchemeError, match="Use mxfp8"):
        ActivationFormat("mxfp8", static=True)


@pytest.mark.parametrize(
    ("scheme", "runs_on"),
    [
        ("w8-aint8", {"vllm", "torchao", "generic"}),
        ("w8-aint8s", {"vllm", "generic"}),
        ("fp8-afp8", {"vllm", "generic"}),
        ("fp8-afp8s", {"vllm", "generic"}),
        ("nvfp4-anvfp4s", {"vllm", "generic"}),
        ("nvfp4-anvfp4", {"generic"}),
        ("w4-aint4", {"generic"}),
        ("mxfp8-amxfp8", {"generic"}),
    ],
)
def test_runtimes_take_the_activations_they_have_kernels_for(scheme, runs_on):
    plan = plan_for(scheme)
    assert {name for name, runtime in RUNTIMES.items() if not lint(plan, runtime)} == runs_on


def test_a_refusal_names_the_activations_that_are_taken():
    (violation,) = lint(plan_for("w8-aint8s"), RUNTIMES["torchao"])
    assert "(activations at full precision or int8)" in violation.rule
    assert "not w8-aint8s" in violation.rule
