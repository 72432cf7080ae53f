"""Caches as decisions: menus, exact bytes, plans that hold them, and runtimes that keep them."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from quant.costs import CostError
from quant.deployment import Deployment, deployment_resources
from quant.geometry import Geometry, geometry_from_json
from quant.kv_cache import Caches, scheme_name
from quant.layers import Inventory, Layer
from quant.lint import RuntimeRefuses, forbidden_caches, lint, require_cache_choices
from quant.plan import Certificate, Digests, PlanError, parse_plan, plan_json, plan_schema
from quant.planning import build_plan
from quant.runtimes import RUNTIMES
from quant.schemes import SchemeError, parse_schemes

ATTENTION = ("m.0.attn", "m.1.attn")
GEOMETRY = Geometry(cached=2 * 2 * 8, windows=(None, 64), vectors=2 * 2, attention=ATTENTION)
INVENTORY = Inventory(
    tuple(
        Layer(name, "linear", (32, 16), (32, 16), 512, None, "other", (), "float16") for name in ("a", "b")
    ),
    (),
    1024,
    40,
)


def plan_with(kv_cache):
    return build_plan(
        INVENTORY,
        {"a": "w4", "b": "w8"},
        digests=Digests(),
        certificate=Certificate("feasible"),
        source="test",
        kv_cache=kv_cache,
    )


def test_a_menu_is_the_full_cache_and_the_types_that_are_asked_for():
    caches = Caches.of(["fp8", "int4"], GEOMETRY, ["w4", "kv-int8", "kv-int4"])
    assert caches == Caches(
        ATTENTION,
        ("kv-full", "kv-fp8_e4m3", "kv-int4"),
        ("kv-full", "kv-fp8_e4m3", "kv-int4", "kv-int8"),
    )
    assert Caches.of([], None) is None
    assert geometry_from_json(json.loads(json.dumps(GEOMETRY.as_json()))) == GEOMETRY


@pytest.mark.parametrize("text", ["kv-int3", "kv-", "kv-float16", "kv-w4"])
def test_a_type_that_no_cache_has_is_refused(text):
    with pytest.raises(SchemeError, match="type of a key-value cache must be one of fp8, "):
        scheme_name(text)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (None, "names no attention layers"),
        (Geometry(64, ()), "generates nothing"),
        (Geometry(64, (None,)), "none that are known"),
    ],
)
def test_a_model_without_caches_has_no_menu(geometry, words):
    with pytest.raises(CostError, match=f"menu of cache types must be for a model that.*{words}"):
        Caches.of(["int8"], geometry)


def test_each_cache_uses_its_own_bytes_and_weights_use_none():
    caches = Caches.of(["int8", "int4", "fp8"], GEOMETRY)
    menu = parse_schemes("w4,w8")
    grids = deployment_resources(INVENTORY, menu, Deployment(100, 3, "bfloat16"), GEOMETRY, caches)
    values, vectors = 2 * 2 * 8, 2 * 2
    for row, tokens in ((2, 3 * 100), (3, 3 * 64)):
        own = (2 * values, values + 2 * vectors, values // 2 + 2 * vectors, values)
        expected = (None, None, *(tokens * size for size in own))
        for name in ("kv_cache_bytes", "memory_bytes", "active_bytes"):
            assert grids[name][row] == expected
        assert grids["checkpoint_bytes"][row] == (None, None, 0, 0, 0, 0)
    stored = [menu[0].storage((32, 16)).bytes, menu[1].storage((32, 16)).bytes]
    assert grids["kv_cache_bytes"][:2] == ((0, 0, *(None,) * 4),) * 2
    assert grids["memory_bytes"][0][:2] == tuple(size + 40 for size in stored)
    assert grids["memory_bytes"][1][:2] == tuple(stored)
    undecided = deployment_resources(INVENTORY, menu, Deployment(100, 3, "bfloat16"), GEOMETRY)
    full = [grids["memory_bytes"][row][2] for row in (2, 3)]
    assert undecided["memory_bytes"][0][0] == grids["memory_bytes"][0][0] + sum(full)


def test_a_menu_needs_a_full_type_beside_it():
    caches = Caches.of(["int8"], GEOMETRY)
    with pytest.raises(CostError, match="menu leaves full must be one of float32"):
        deployment_resources(INVENTORY, parse_schemes("w4"), Deployment(9, 1, "int8"), GEOMETRY, caches)


def test_a_plan_keeps_its_caches():
    plan = plan_with({"m.1.attn": "int8", "m.0.attn": "full"})
    again = parse_plan(plan_json(plan))
    assert again == plan
    assert again.kv_cache == {"m.0.attn": "full", "m.1.attn": "int8"}
    assert again.weights == {"a": "w4", "b": "w8"}
    assert again.assignment == {"a": "w4", "b": "w8", "m.0.attn": "kv-full", "m.1.attn": "kv-int8"}
    assert plan.digest != plan_with({"m.0.attn": "int8", "m.1.attn": "full"}).digest
    assert Draft202012Validator(plan_schema()).is_valid(plan.as_json())
    assert "kv_cache" not in plan_with(None).as_json()


@pytest.mark.parametrize("value", [{}, {"m.0.attn": "int3"}, {"m.0.attn": 8}, ["int8"]])
def test_a_changed_plan_is_refused_by_place(value):
    document = plan_with({"m.0.attn": "int8"}).as_json() | {"kv_cache": value}
    with pytest.raises(PlanError, match="/kv_cache"):
        parse_plan(json.dumps(document))
    assert not Draft202012Validator(plan_schema()).is_valid(document)


DIFFERENT = (
    "key-value caches must have one type, and m.0.attn has full, not fp8_e4m3: pin all to one, or plan for a"
    " runtime, which ties them"
)


@pytest.mark.parametrize(
    ("runtime", "kinds", "rules"),
    [
        ("generic", ("int4", "fp8_e4m3"), []),
        ("vllm", ("fp8_e4m3", "fp8_e4m3"), []),
        ("vllm", ("full", "full"), []),
        ("vllm", ("full", "fp8_e4m3"), [DIFFERENT]),
        (
            "mlx",
            ("fp8_e5m2", "fp8_e5m2"),
            ["key-value caches must be full or int8 or int4, not fp8_e5m2: plan with kv_cache int8,int4"] * 2,
        ),
        ("torchao", ("int4", "int4"), ["key-value caches must be full, not int4: plan without kv_cache"] * 2),
    ],
)
def test_a_runtime_says_which_caches_it_keeps(runtime, kinds, rules):
    plan = plan_with(dict(zip(ATTENTION, kinds, strict=True)))
    of_caches = [item.rule for item in lint(plan, RUNTIMES[runtime]) if item.layer in ATTENTION]
    assert of_caches == rules


def test_what_a_runtime_does_not_keep_is_no_choice():
    caches = Caches.of(["fp8", "int4"], GEOMETRY)
    vllm = RUNTIMES["vllm"]
    assert forbidden_caches(caches, vllm) == dict.fromkeys(ATTENTION, ("kv-int4",))
    assert forbidden_caches(caches, RUNTIMES["generic"]) == {}
    require_cache_choices(caches, {}, vllm)
    for runtime in ("torchao", "llama.cpp"):
        words = (
            f"^{runtime} keeps no type of cache that can be decided. Got fp8_e4m3, int4. Leave kv_cache out.$"
        )
        with pytest.raises(RuntimeRefuses, match=words):
            require_cache_choices(caches, {}, RUNTIMES[runtime])
    with pytest.raises(
        RuntimeRefuses, match="must hold one that openvino keeps: int8. Got fp8_e4m3, int4. Change"
    ):
        require_cache_choices(caches, {}, RUNTIMES["openvino"])
    pin = r"pin of a cache must be full or a type that vllm keeps: fp8_e4m3\. Got kv-int4 for m\.1\.attn"
    with pytest.raises(RuntimeRefuses, match=pin):
        require_cache_choices(caches, {"m.1.attn": "kv-int4"}, vllm)
    with pytest.raises(RuntimeRefuses, match="must have one type under vllm"):
        require_cache_choices(caches, {"m.0.attn": "kv-full", "m.1.attn": "kv-fp8_e4m3"}, vllm)
