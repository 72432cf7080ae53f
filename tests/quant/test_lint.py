from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quant.digest import canonical_json
from quant.layers import Excluded, Inventory, Layer
from quant.lint import RuntimeRefuses, Violation, forbidden_schemes, fused_sets, lint, require_choices
from quant.plan import Certificate, Digests, PlanError, parse_plan, plan_json
from quant.planning import build_plan
from quant.runtime_rules import planned_target, target_of
from quant.runtimes import RUNTIMES
from quant.schemes import parse_scheme

VLLM = RUNTIMES["vllm"]
ATTENTION = ("m.0.q_proj", "m.0.k_proj", "m.0.v_proj")


def layer(name, matrix=(128, 256), op="linear", role="other", aliases=(), dtype="float32"):
    return Layer(name, op, matrix, matrix, matrix[0] * matrix[1], None, role, aliases, dtype)


def inventory(*layers, excluded=()):
    return Inventory(tuple(layers), tuple(excluded), sum(item.parameters for item in layers), 0)


def plan_of(found, assignment, runtime=None):
    return build_plan(
        found,
        assignment,
        digests=Digests(),
        certificate=Certificate("feasible"),
        source="test",
        runtime=runtime,
    )


@pytest.fixture
def attention():
    return inventory(*map(layer, ATTENTION), layer("m.0.o_proj"))


@pytest.mark.parametrize(
    ("runtime", "scheme", "target", "words"),
    [
        ("vllm", "w3", layer("a"), "w4, w8 per channel or in groups of 32, 64, 128, symmetric"),
        ("vllm", "w8-asym", layer("a"), "not w8-asym"),
        ("vllm", "w4", layer("a", (100, 256)), "output channels must be a multiple of 64, not 100"),
        ("vllm", "w4", layer("a", (128, 320)), "columns must be a multiple of 128, not 320"),
        ("vllm", "w4", layer("lm_head", role="head"), "output heads keep their precision"),
        ("vllm", "w4", layer("e", op="embedding", role="embedding"), "embeddings keep their precision"),
        ("vllm", "w4", layer("c", op="conv2d"), "conv2d layers take bf16*, fp16*; not w4"),
        ("vllm", "bf16", layer("a"), "16-bit weights must have the model's own type, which is float32"),
        ("mlx", "fp16", layer("a", dtype="bfloat16"), "own type, which is bfloat16"),
        ("vllm", "w4", layer("a", dtype="bfloat16"), "so they must be bfloat16, not float16"),
        (
            "vllm",
            "w4-g32-asym-bfloat16",
            layer("a", dtype="float16"),
            "so they must be float16, not bfloat16",
        ),
        ("llama.cpp", "w4", layer("a"), "q4_k"),
        ("llama.cpp", "q8_0", layer("pooler.dense"), "llama.cpp does without this layer"),
        ("llama.cpp", "bf16", layer("bert.pooler.dense"), "llama.cpp does without this layer"),
        ("torchao", "w4-g96", layer("a"), "columns must be a multiple of the group size 96, not 256"),
        ("mlx", "w4", layer("a"), "w8 in groups of 32, 64, 128"),
        ("mlx", "w4-g32", layer("a"), "not w4-g32"),
        ("mlx", "w7-g32-asym", layer("a"), "not w7-g32-asym"),
        ("onnxruntime", "w4-g48", layer("a"), "in groups of 16, 32, 64, 128, 256"),
        ("openvino", "w4", layer("e", op="embedding"), "not w4"),
        ("openvino", "w6", layer("a"), "not w6"),
    ],
)
def test_a_runtime_refuses_by_rule(runtime, scheme, target, words):
    assert words in RUNTIMES[runtime].refuses(target_of(target), parse_scheme(scheme))


@pytest.mark.parametrize(
    ("runtime", "scheme", "target"),
    [
        ("vllm", "w4-g128", layer("a")),
        ("vllm", "w4-g32-asym", layer("a")),
        ("vllm", "w8", layer("a")),
        ("vllm", "w4-bfloat16", layer("a")),
        ("vllm", "w4-bfloat16", layer("a", dtype="bfloat16")),
        ("vllm", "w8-float16-aint8", layer("a", dtype="bfloat16")),
        ("vllm", "bf16", layer("a", dtype="bfloat16")),
        ("llama.cpp", "bf16", layer("a")),
        ("torchao", "w3-asym", layer("e", op="embedding")),
        ("mlx", "w6-g64-asym", layer("lm_head", role="head")),
        ("onnxruntime", "w4-g32", layer("a", (10, 33))),
        ("openvino", "w8-asym", layer("c", op="conv2d")),
        ("generic", "w2-tensor-float32", layer("c", op="conv1d")),
    ],
)
def test_a_runtime_takes_what_its_kernels_take(runtime, scheme, target):
    assert RUNTIMES[runtime].refuses(target_of(target), parse_scheme(scheme)) is None


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_is_plain_data(name):
    runtime = RUNTIMES[name]
    assert json.loads(json.dumps(runtime.as_json()))["name"] == runtime.name == name
    assert runtime.rules
    assert runtime.summary
    assert runtime.source
    assert runtime.kv_cache


def test_a_tensor_shared_with_the_head_is_a_head():
    shared = layer("embed", op="embedding", role="embedding", aliases=("lm_head",))
    with_embeddings = replace(VLLM, embeddings=True)
    assert (
        with_embeddings.refuses(target_of(shared), parse_scheme("w4")) == "output heads keep their precision"
    )


def test_fused_sets_are_found_by_the_ends_of_paths():
    names = [*ATTENTION, "m.1.q_proj", "m.0.mlp.gate_proj", "m.0.mlp.up_proj", "m.0.mlp.down_proj"]
    experts = [f"m.0.experts.{n}.{w}" for n in (0, 1) for w in ("w1", "w2", "w3")]
    assert fused_sets(VLLM, [*names, *experts]) == (
        ATTENTION,
        ("m.0.mlp.gate_proj", "m.0.mlp.up_proj"),
        tuple(experts),
    )


def test_experts_are_stacked_or_a_block():
    apart = [f"m.0.experts.{n}.{w}" for n in (0, 1) for w in ("gate_proj", "up_proj", "down_proj")]
    for name in ("llama.cpp", "mlx"):
        assert fused_sets(RUNTIMES[name], apart) == (
            ("m.0.experts.0.gate_proj", "m.0.experts.1.gate_proj"),
            ("m.0.experts.0.up_proj", "m.0.experts.1.up_proj"),
            ("m.0.experts.0.down_proj", "m.0.experts.1.down_proj"),
        )
        assert fused_sets(RUNTIMES[name], ["m.0.experts.gate_up_proj", "m.0.experts.down_proj"]) == ()
    fused = ("m.0.experts.gate_up_proj", "m.0.experts.down_proj")
    assert fused_sets(VLLM, [*fused, "m.1.experts.down_proj"]) == (fused,)


def experts(op, rows):
    shape = (4, rows, 256) if op == "experts" else (4, 256, rows)
    return Layer(
        "m.experts.down_proj", op, shape, (4 * rows, 256), 4 * rows * 256, None, "other", (), "float32"
    )


@pytest.mark.parametrize("op", ["experts", "experts_transposed"])
def test_rules_see_the_matrix_of_one_expert(op):
    found = experts(op, 16)
    assert target_of(found).matrix == (16, 256)
    planned = build_plan(
        Inventory((found,), (), found.parameters, found.stored_bytes),
        {found.name: "q4_k"},
        digests=Digests(),
        certificate=Certificate("feasible"),
        source="test",
    )
    assert planned_target(found.name, planned.layers[found.name]).matrix == (16, 256)
    assert lint(planned, RUNTIMES["llama.cpp"]) == ()
    rule = "w4: output channels must be a multiple of 64, not 16"
    if op == "experts_transposed":
        rule = "experts_transposed layers take bf16*, fp16*; not w4"
    assert VLLM.refuses(target_of(found), parse_scheme("w4")) == rule
    assert (VLLM.refuses(target_of(experts(op, 64)), parse_scheme("w4")) is None) == (op == "experts")
    assert RUNTIMES["generic"].refuses(target_of(found), parse_scheme("w4")) is None
    assert "experts layers" in str(
        RUNTIMES["openvino"].refuses(target_of(experts("experts", 16)), parse_scheme("w8"))
    )


def test_lint_names_every_layer_and_rule(attention):
    plan = plan_of(attention, dict.fromkeys(ATTENTION, "w4") | {"m.0.k_proj": "w8", "m.0.o_proj": "w3"})
    found = lint(plan, VLLM)
    assert [violation.layer for violation in found] == ["m.0.o_proj", "m.0.k_proj"]
    assert "not w3" in found[0].rule
    assert found[1] == Violation(
        "m.0.k_proj", "is fused with m.0.q_proj, which has w4: it must have the same, not w8"
    )
    assert lint(plan, RUNTIMES["generic"]) == ()


def test_a_plan_that_its_runtime_cannot_run_is_not_built(attention):
    mixed = dict.fromkeys(ATTENTION, "w4") | {"m.0.v_proj": "w8", "m.0.o_proj": "w4"}
    with pytest.raises(PlanError, match=r"must be one that vllm runs.*m\.0\.v_proj"):
        plan_of(attention, mixed, "vllm")
    plan = plan_of(attention, dict.fromkeys(mixed, "w4"), "vllm")
    assert parse_plan(plan_json(plan)) == plan
    assert plan.as_json()["runtime"] == "vllm"
    assert "runtime" not in plan_of(attention, mixed).as_json()


def test_forbidden_schemes_are_those_that_are_refused(attention):
    menu = [parse_scheme(name) for name in ("w2", "w4", "w8-asym")]
    assert forbidden_schemes(attention.layers[:1], menu, VLLM) == {"m.0.q_proj": ("w2", "w8-asym")}
    assert forbidden_schemes(attention.layers, menu, RUNTIMES["generic"]) == {}


@pytest.mark.parametrize(
    ("menu", "pins", "words"),
    [
        (("w2", "w3"), {}, r"menu must hold a scheme that vllm runs.*m\.0\.q_proj.*not w2"),
        (("w4",), {"m.0.o_proj": "w2"}, r"pin must hold a scheme that vllm runs.*m\.0\.o_proj"),
        (("w4", "w8"), {"m.0.q_proj": "w4", "m.0.k_proj": "w8"}, r"share a scheme.*m\.0\.q_proj: w4"),
    ],
)
def test_a_layer_without_any_choice_is_named(attention, menu, pins, words):
    with pytest.raises(RuntimeRefuses, match=words):
        require_choices(attention, menu, pins, VLLM)


def test_fused_layers_take_part_together(attention):
    left_out = Excluded("m.0.v_proj", "linear", 1, "excluded")
    partly = inventory(
        *(item for item in attention.layers if item.name != "m.0.v_proj"), excluded=(left_out,)
    )
    with pytest.raises(RuntimeRefuses, match=r"all take part, or none.*m\.0\.v_proj"):
        require_choices(partly, ("w4",), {}, VLLM)
    require_choices(partly, ("w4",), {}, RUNTIMES["torchao"])


@pytest.mark.parametrize(
    ("scheme", "runtimes"),
    [
        ("fp8", {"vllm", "torchao"}),
        ("fp8-e5m2", set()),
        ("nvfp4", {"vllm"}),
        ("mxfp4", {"mlx", "openvino"}),
        ("nf4", {"openvino"}),
        ("q4_0", {"llama.cpp"}),
        ("q6_k", {"llama.cpp"}),
        ("bf16", {"llama.cpp", "openvino"}),
    ],
)
def test_formats_beyond_integers_go_to_the_runtimes_that_have_them(scheme, runtimes):
    parsed, target = parse_scheme(scheme), target_of(layer("a"))
    taking = {name for name, runtime in RUNTIMES.items() if runtime.refuses(target, parsed) is None}
    assert taking == runtimes | {"generic"}


def test_block_types_need_whole_blocks():
    odd = target_of(layer("a", (128, 96)))
    assert RUNTIMES["llama.cpp"].refuses(odd, parse_scheme("q4_k")) == (
        "q4_k: columns must be a multiple of 256, not 96"
    )
    assert RUNTIMES["llama.cpp"].refuses(odd, parse_scheme("q4_0")) is None


@pytest.mark.parametrize("name", RUNTIMES)
def test_tensors_beside_the_format_are_for_runtimes_that_load_them(name):
    refusal = RUNTIMES[name].refuses(target_of(layer("fc", (256, 256))), parse_scheme("w4-lorc8"))
    assert refusal is None if name == "generic" else "take no tensors beside the format's" in refusal


def test_a_plan_says_what_type_its_layers_are_stored_in():
    """So a plan alone is enough to know that the export would refuse it."""
    plan = plan_of(inventory(layer("a", dtype="bfloat16"), layer("b")), {"a": "bf16", "b": "bf16"})
    assert [found.layer for found in lint(parse_plan(plan_json(plan)), VLLM)] == ["b"]
    document = json.loads(plan_json(plan))
    for told in document["layers"].values():
        del told["dtype"]
    silent = parse_plan(json.dumps(document))
    assert lint(silent, VLLM) == ()
    assert plan_json(silent) == canonical_json(document)
    document["layers"]["a"]["dtype"] = "int8"
    with pytest.raises(PlanError, match="/layers/a/dtype must be one of float64"):
        parse_plan(json.dumps(document))
