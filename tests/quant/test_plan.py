import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from quant.layers import Excluded, Inventory, Layer
from quant.plan import OPTIONAL, Certificate, Digests, PlanError, parse_plan, plan_json, plan_schema
from quant.planning import build_plan

DIGESTS = Digests("a" * 64, "b" * 64, "c" * 64, None)


def layer(name, shape, macs=100, aliases=()):
    return Layer(name, "linear", shape, shape, shape[0] * shape[1], macs, "other", aliases, "float32")


@pytest.fixture
def inventory():
    layers = (layer("b.up", (7, 33)), layer("a.down", (16, 64), aliases=("head",)))
    return Inventory(layers, (Excluded("norm", "LayerNorm", 9, "why not"),), 1300, 36)


def make(inventory, **changes):
    fields = {
        "digests": DIGESTS,
        "budget": "3.5 bpw",
        "metric": "output_kl",
        "predicted": 0.25,
        "certificate": Certificate("optimal", 0.25, 0.25, 0.0),
        "source": "additive output_kl",
    }
    return build_plan(inventory, {"b.up": "w3", "a.down": "w4-g32-asym"}, **{**fields, **changes})


def test_sizes_are_those_of_the_formats(inventory):
    plan = make(inventory)
    up, down = -(-7 * 33 * 3 // 8) + 14, 16 * 64 // 2 + 64 + 16
    assert [plan.layers[name].bytes for name in ("b.up", "a.down")] == [up, down]
    assert plan.totals.bytes == up + down
    assert plan.totals.parameters == 7 * 33 + 16 * 64
    assert plan.totals.bits_per_weight == 8 * (up + down) / (7 * 33 + 16 * 64)
    assert plan.totals.checkpoint_bytes == up + down + 36
    assert plan.totals.bops == 100 * 3 * 32 + 100 * 4 * 32
    assert plan.quantizers == {"mse_clip": 1}
    assert plan.assignment == {"b.up": "w3", "a.down": "w4-g32-asym"}


def test_the_document_reads_back_to_the_same_bytes(inventory):
    plan = make(inventory, predicted=1, certificate=Certificate("feasible", 2, None, None))
    text = plan_json(plan)
    assert plan_json(parse_plan(text)) == text
    assert parse_plan(text.encode()).digest == plan.digest
    assert parse_plan(json.dumps(json.loads(text), indent=2)).digest == plan.digest


def test_the_order_of_the_assignment_does_not_matter(inventory):
    turned = replace(inventory, layers=inventory.layers[::-1])
    assert plan_json(make(turned)) == plan_json(make(inventory))


def test_the_published_schema_accepts_plans_and_is_a_schema(inventory):
    schema = plan_schema()
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    document = json.loads(plan_json(make(inventory)))
    validator.validate(document)
    validator.validate(json.loads(plan_json(make(inventory, predicted=None, metric=None))))
    assert not validator.is_valid({**document, "extra": 1})
    assert not validator.is_valid({key: value for key, value in document.items() if key != "totals"})


def test_schema_and_reader_name_the_same_fields(inventory):
    document, schema = json.loads(plan_json(make(inventory))), plan_schema()
    assert set(schema["required"]) == set(document)
    assert set(schema["properties"]) == set(document) | set(OPTIONAL)
    assert {*schema["$defs"]["layer"]["required"], "dtype"} == set(document["layers"]["b.up"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], "bitplan.plan/9", "schema must be 'bitplan.plan/1'"),
        (["layers"], {}, "at least one layer"),
        (["layers", "b.up", "bytes"], 5, "/layers/b.up/bytes must be 101"),
        (["layers", "b.up", "scheme"], "w3-channel", "/layers/b.up/scheme must be 'w3'"),
        (["layers", "b.up", "scheme"], "w33", "Weight bits must be 2 to 8"),
        (["layers", "b.up", "spelled"], "w3", "/layers/b.up/spelled"),
        (["layers", "b.up", "weight_bits"], True, "/layers/b.up/weight_bits must be an integer"),
        (["layers", "b.up", "matrix"], [7, 34], "/layers/b.up"),
        (["layers", "b.up", "matrix"], [7], "two integers"),
        (["layers", "b.up", "shape"], [7, 3], "/layers/b.up/parameters"),
        (["layers", "b.up", "aliases"], "head", "/layers/b.up/aliases must be an array"),
        (["totals", "bytes"], 7, "sums over its layers"),
        (["totals", "bits_per_weight"], 3.5, "sums over its layers"),
        (["totals", "checkpoint_bytes"], 1, "sums over its layers"),
        (["digests", "model"], "zz", "/digests/model must be 64 lowercase hexadecimal"),
        (["certificate", "status"], "infeasible", "/certificate/status must be one of optimal, feasible"),
        (["certificate", "bound"], "low", "/certificate/bound must be a number"),
        (["predicted"], 10**400, "fits in a float"),
        (["budget"], None, "/budget must be a text"),
        (["extra"], 1, "/extra must be one of"),
    ],
)
def test_a_changed_document_is_refused_by_place(inventory, path, value, message):
    document = json.loads(plan_json(make(inventory)))
    target = document
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    with pytest.raises(PlanError) as raised:
        parse_plan(json.dumps(document))
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"schema":1,"schema":1}', "[" * 100_000, b"\xff"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError, match="Plan"):
        parse_plan(text)


def test_nan_is_refused(inventory):
    text = plan_json(make(inventory)).replace('"predicted":0.25', '"predicted":NaN')
    with pytest.raises(PlanError, match="/predicted must be a finite number"):
        parse_plan(text)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"b.up": "w4"}, r"Got none for a\.down \(1 in all\)"),
        ({"b.up": "w4", "a.down": "w4", "a.dwn": "w4"}, r"Got 'a\.dwn'\. Names are like a\.down"),
        ({"b.up": "w4-g64", "a.down": "w4"}, r"Got w4-g64 for b\.up: groups of 64 are longer"),
    ],
)
def test_plans_cover_the_inventory(inventory, assignment, message):
    with pytest.raises(PlanError, match=message):
        build_plan(inventory, assignment, digests=DIGESTS, certificate=Certificate("optimal"), source="x")


def test_bops_need_every_mac_count(inventory):
    layers = (replace(inventory.layers[0], macs=None), inventory.layers[1])
    assert make(replace(inventory, layers=layers)).totals.bops is None
