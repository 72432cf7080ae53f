from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensitivity.table import TableError, exact_decimal, table_json
from sensitivity.table_reader import parse_table

DOCUMENT: dict[str, Any] = {
    "schema": "bitplan.table/1",
    "layers": [
        {"name": "q", "parameters": 64, "macs": 1024, "group": "qkv", "role": "attention"},
        {"name": "k", "parameters": 64, "group": "qkv"},
        {"name": "up/proj", "parameters": 128},
    ],
    "schemes": ["w2", "w4", "w8"],
    "metrics": {
        "loss": {
            "direction": "min",
            "values": [[0.9, 0.1, -1e-12], [0.8, None, 0.0], [3, 0.5, 0.25]],
            "stderr": [[0.05, 0.01, 0], [0.1, None, None], [0, 0, 0]],
        },
        "accuracy": {"direction": "max", "values": [[1, 2, 3], [1, 2, 3], [None, 2, 3]]},
    },
    "resources": {"bytes": [[16, 32, 64]] * 3, "latency_ns": [[10, 12.1, 20]] * 3},
}

Change = Callable[[dict[str, Any]], object]


def _fused(**changes: Any) -> Change:
    """Sets one candidate."""
    candidate = {"layers": ["q", "k"], "scheme": "w4", **changes}
    return lambda document: document.update(fused=[candidate])


def _both(first: Change, second: Change) -> Change:
    return lambda document: (first(document), second(document))


def _parse(document: object) -> Any:
    return parse_table(json.dumps(document))


def test_the_published_shape_is_read() -> None:
    table = _parse(DOCUMENT)
    assert table.layer_names == ("q", "k", "up/proj")
    assert table.parameters == 256
    assert (table.layers[0].macs, table.layers[0].group, table.layers[0].role) == (1024, "qkv", "attention")
    assert table.layers[2].group is None
    assert np.isnan(table.metrics["loss"].values[1, 1])
    assert table.metrics["loss"].stderr[0].tolist() == [0.05, 0.01, 0.0]
    assert table.metrics["accuracy"].direction == "max"
    assert table.metrics["accuracy"].stderr is None
    assert table.resources["latency_ns"][0] == (10, Fraction(121, 10), 20)


def test_null_anywhere_means_not_offered() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["resources"]["bytes"] = [[16, None, 64], [16, 32, 64], [16, 32, 64]]
    table = _parse(document)
    assert table.offered("loss").tolist() == [[True, False, True], [True, False, True], [True, True, True]]
    assert table.offered("accuracy").tolist() == [[True, False, True], [True] * 3, [False, True, True]]


def test_a_cache_has_no_parameters_and_says_what_it_keeps() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["layers"][2] |= {"parameters": 0, "kept": "w8"}
    table = _parse(document)
    assert (table.layers[2].kept, table.parameters) == ("w8", 128)
    assert table_json(parse_table(table_json(table))) == table_json(table)
    document["layers"][2]["kept"] = "w9"
    with pytest.raises(TableError, match="/layers/2/kept must be one of the schemes"):
        _parse(document)
    for layer in document["layers"]:
        layer |= {"parameters": 0, "kept": "w8"}
    with pytest.raises(TableError, match="/layers must have parameters"):
        _parse(document)


def test_writing_and_reading_are_inverse() -> None:
    text = table_json(_parse(DOCUMENT))
    assert table_json(parse_table(text)) == text
    peak = table_json(
        _parse(DOCUMENT | {"maxima": {"peak": {"resource": "bytes", "cuts": [["q", "k"], ["k"]]}}})
    )
    assert parse_table(peak).maxima["peak"].cuts == (("q", "k"), ("k",))
    assert table_json(parse_table(peak)) == peak
    assert table_json(parse_table(text.encode())) == text
    assert '"latency_ns":[[10,12.1,20]' in text
    assert json.loads(text)["metrics"]["loss"]["values"] == DOCUMENT["metrics"]["loss"]["values"]


def test_fused_candidates_have_their_own_numbers_or_the_sum_of_cells() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["fused"] = [
        {"layers": ["q", "k"], "scheme": "w2", "resources": {"latency_ns": 12.1}},
        {"layers": ["k", "up/proj"], "scheme": "w4", "metrics": {"loss": 0.3}, "stderr": {"loss": 0.02}},
    ]
    table = _parse(document)
    first, second = table.fused
    assert table.fused_usage(first, "latency_ns") == Fraction(121, 10)
    assert (table.fused_usage(first, "bytes"), table.fused_usage(first, "bytes", ["k"])) == (32, 16)
    assert table.fused_usage(first, "latency_ns", ["k"]) == Fraction(121, 10)
    assert table.fused_usage(first, "latency_ns", ["up/proj"]) == 0
    assert table.fused_score(first, "loss") == Fraction(0.9) + Fraction(0.8)
    assert table.fused_error(first, "loss") == Fraction(0.05) + Fraction(0.1)
    assert (table.fused_score(second, "loss"), table.fused_error(second, "loss")) == (0.3, 0.02)
    assert (table.fused_score(second, "accuracy"), table.fused_error(second, "accuracy")) == (4, None)
    assert [table.fused_offered(one, "accuracy") for one in table.fused] == [True, True]
    assert table_json(parse_table(table_json(table))) == table_json(table)
    with pytest.raises(TypeError):
        first.resources["bytes"] = 1


def test_a_layer_may_be_offered_schemes_by_candidates_alone() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["metrics"]["loss"] = {"direction": "min", "values": [[None] * 3, [0.8, None, 0], [3, 0.5, 0.2]]}
    with pytest.raises(TableError, match="/metrics/loss/values/0 must offer at least one scheme"):
        _parse(document)
    document["fused"] = [{"layers": ["q", "k"], "scheme": "w4", "metrics": {"loss": 0.3}}]
    assert _parse(document).fused_offered(_parse(document).fused[0], "loss")


def test_arrays_are_read_only() -> None:
    table = _parse(DOCUMENT)
    with pytest.raises(ValueError, match="read-only"):
        table.metrics["loss"].values[0, 0] = 1
    with pytest.raises(TypeError):
        table.metrics["new"] = table.metrics["loss"]


@given(st.integers(-(10**20), 10**20), st.integers(0, 12), st.integers(0, 12))
def test_exact_decimals_survive(numerator: int, twos: int, fives: int) -> None:
    value = Fraction(numerator, 2**twos * 5**fives)
    assert Fraction(exact_decimal(value)) == value


def test_what_is_no_decimal_is_refused() -> None:
    with pytest.raises(TableError, match=r"finite decimal\. Got 1/3"):
        exact_decimal(Fraction(1, 3))


def _set(*path: Any) -> Change:
    *keys, value = path

    def change(document: dict[str, Any]) -> None:
        node: Any = document
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("schema", "bitplan.table/2"), r'/schema must be "bitplan.table/1". Got'),
        (_set("extra", 1), "/extra must be one of schema, layers"),
        (lambda d: d.pop("schemes"), "/schemes must be present"),
        (_set("layers", []), "/layers must be a list with at least one entry"),
        (_set("layers", 0, "color", "red"), "/layers/0/color must be one of name"),
        (_set("layers", 0, "name", ""), "/layers/0/name must be a text"),
        (_set("layers", 0, "name", 3), "/layers/0/name must be a text"),
        (_set("layers", 1, "name", "q"), "/layers/1/name must be unique. Got 'q' twice"),
        (_set("layers", 0, "parameters", 0), "/layers/0/parameters must be an integer from 1"),
        (_set("layers", 0, "parameters", 1.5), "/layers/0/parameters must be an integer"),
        (_set("layers", 0, "parameters", True), "/layers/0/parameters must be a number"),
        (_set("layers", 0, "parameters", None), "/layers/0/parameters must be an integer"),
        (_set("layers", 0, "macs", -1), "/layers/0/macs must be an integer from 0"),
        (_set("layers", 0, "group", 7), "/layers/0/group must be a text"),
        (_set("schemes", ["w2", "w2", "w8"]), "/schemes/1 must be unique"),
        (_set("metrics", {}), "/metrics must have at least one entry"),
        (_set("metrics", []), "/metrics must be an object. Got a list"),
        (_set("metrics", "loss", "direction", "up"), '/metrics/loss/direction must be "min" or "max"'),
        (_set("metrics", "loss", "values", [[1, 2, 3]]), "one row per layer \\(3\\). Got 1 rows"),
        (_set("metrics", "loss", "values", 0, [1, 2]), "/metrics/loss/values/0 must be .*Got 2 values"),
        (_set("metrics", "loss", "values", 0, 1, "0.1"), "/metrics/loss/values/0/1 must be a number or null"),
        (_set("metrics", "loss", "values", 0, 1, float("nan")), "/metrics/loss/values/0/1 must be a finite"),
        (_set("metrics", "loss", "values", 0, 1, float("-inf")), "/metrics/loss/values/0/1 must be a finite"),
        (_set("metrics", "loss", "stderr", 0, 1, -0.1), "/metrics/loss/stderr/0/1 must be 0 or more"),
        (
            _set("metrics", "loss", "stderr", 1, 1, 0.1),
            "/metrics/loss/stderr/1/1 must be 0 or more and belong",
        ),
        (
            _set("metrics", "loss", "values", 2, [None] * 3),
            "/metrics/loss/stderr/2/0 must be 0 or more and belong",
        ),
        (
            _set("metrics", "accuracy", "values", 2, [None] * 3),
            "/metrics/accuracy/values/2 must offer .*'up/proj'",
        ),
        (_set("resources", "bytes", [[16, 32]] * 3), "/resources/bytes/0 must be .*Got 2 values"),
        (
            _set("resources", "bits_per_weight", [[1, 2, 3]] * 3),
            "/resources/bits_per_weight must be left out",
        ),
        (_set("resources", "a/b", [[1e31, 2, 3]] * 3), "/resources/a~1b/0/0 must be at most 1e30"),
        (_set("resources", "bytes", [[1e-70, 2, 3]] * 3), "/resources/bytes/0/0 must be .*60 decimals"),
        (_set("maxima", {"bytes": {}}), "/maxima/bytes must have a name of its own"),
        (_set("maxima", {"p": {"resource": "bytes"}}), "/maxima/p/cuts must be present"),
        (_set("maxima", {"p": {"resource": "x", "cuts": [["q"]]}}), "/maxima/p/resource must be a resource"),
        (
            _set("maxima", {"p": {"resource": "bytes", "cuts": []}}),
            "/maxima/p/cuts must be a list with at least",
        ),
        (
            _set("maxima", {"p": {"resource": "bytes", "cuts": [["w"]]}}),
            "/maxima/p/cuts/0/0 must be the name of",
        ),
        (
            _set("maxima", {"p": {"resource": "bytes", "cuts": [["q", "q"]]}}),
            "/maxima/p/cuts/0/1 must be unique",
        ),
        (_fused(name="qkv"), "/fused/0/name must be one of layers, scheme, metrics, stderr, resources"),
        (_set("fused", {"layers": []}), "/fused must be a list"),
        (_set("fused", [{"layers": ["q", "k"]}]), "/fused/0/scheme must be present"),
        (_fused(layers=["q"]), "/fused/0/layers must name at least two layers. Got 'q' alone"),
        (_fused(layers=["q", "q"]), "/fused/0/layers/1 must be unique"),
        (_fused(layers=["q", "w"]), "/fused/0/layers/1 must be the name of a layer. Got 'w'"),
        (_fused(scheme="w3"), "/fused/0/scheme must be a scheme of the table: w2, w4, w8. Got 'w3'"),
        (_fused(metrics={"lost": 1}), "/fused/0/metrics/lost must be one of loss, accuracy"),
        (_fused(metrics={"loss": None}), "/fused/0/metrics/loss must be a number. Got null. Leave it out"),
        (_fused(metrics={"loss": "x"}), "/fused/0/metrics/loss must be a number"),
        (_fused(resources={"bytes": 1e31}), "/fused/0/resources/bytes must be at most 1e30"),
        (_fused(resources={"energy": 1}), "/fused/0/resources/energy must be one of bytes, latency_ns"),
        (_fused(stderr={"loss": 0.1}), "/fused/0/stderr/loss must be 0 or more and belong to a score"),
        (
            _fused(metrics={"loss": 1}, stderr={"loss": -0.1}),
            "/fused/0/stderr/loss must be 0 or more",
        ),
        (
            _both(_set("resources", "bytes", 0, [16, None, 64]), _fused()),
            "/fused/0/resources/bytes must be given, since a layer .* at w4. Got none",
        ),
    ],
)
def test_faults_are_named_by_their_pointer(change: Change, words: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(TableError, match=words):
        _parse(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be JSON. Got Expecting value at line 1"),
        ("[1]", "The table must be an object. Got a list"),
        ("[" * 100_000, "too many nested brackets"),
        (b"\xff{}", "must be UTF-8"),
        (
            '{"schema": "bitplan.table/1", "schema": "bitplan.table/1"}',
            "/schema must appear once. Got it twice",
        ),
        ('{"schema": 1' + "0" * 5000 + "}", "/layers must be present"),
    ],
)
def test_texts_that_are_no_table(text: str | bytes, words: str) -> None:
    with pytest.raises(TableError, match=words):
        parse_table(text)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 5000, "1e999999999", "Infinity", "NaN"])
@pytest.mark.parametrize("where", ["metrics", "resources"])
def test_numbers_beyond_double_precision_are_refused(number: str, where: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    target = document["metrics"]["loss"]["values"] if where == "metrics" else document["resources"]["bytes"]
    target[0] = ["NUMBER", *target[0][1:]]
    if where == "resources":
        document["resources"]["bytes"] = target
    with pytest.raises(TableError, match="/0/0 must be"):
        parse_table(json.dumps(document).replace('"NUMBER"', number))


def test_duplicate_keys_are_found_at_any_depth() -> None:
    text = json.dumps(DOCUMENT).replace('"parameters": 128', '"parameters": 128, "parameters": 128')
    with pytest.raises(TableError, match="/layers/2/parameters must appear once"):
        parse_table(text)


def test_resources_may_be_absent_numbers_but_not_the_field() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["resources"] = {}
    assert _parse(document).resources == {}
