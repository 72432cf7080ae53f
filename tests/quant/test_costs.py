from fractions import Fraction

import pytest

from quant.costs import CostError, latency_from_mapping, read_latency_table, resources
from quant.layers import Layer
from quant.schemes import parse_schemes


def layer(name="fc", shape=(10, 33), macs=330, dtype="float32", aliases=()):
    return Layer(name, "linear", shape, shape, shape[0] * shape[1], macs, "other", aliases, dtype)


def test_bytes_count_values_scales_and_zero_points():
    grids = resources([layer()], parse_schemes("w3,w3-asym,w3-g32,w3-tensor-float32"))
    values, padded = -(-330 * 3 // 8), 10 * 64 * 3 // 8
    assert grids["bytes"] == ((values + 20, values + 20 + 4, padded + 40, values + 4),)
    assert grids["bits"] == (tuple(8 * cell for cell in grids["bytes"][0]),)


def test_bops_use_the_activation_bits_of_the_layer():
    grids = resources([layer(), layer("half", dtype="bfloat16")], parse_schemes("w2,w8"))
    assert grids["bops"] == ((330 * 2 * 32, 330 * 8 * 32), (330 * 2 * 16, 330 * 8 * 16))


def test_a_refused_choice_is_null_in_every_grid():
    grids = resources([layer()], parse_schemes("w4,w4-g64"), latency_from_mapping({"fc": {"w4": 1}}))
    assert [grid[0][1] for grid in grids.values()] == [None] * 4
    assert set(grids) == {"bytes", "bits", "bops", "latency_ns"}


def test_bops_are_left_out_without_a_mac_count():
    assert "bops" not in resources([layer(), layer("b", macs=None)], parse_schemes("w4"))


def test_latency_is_exact_in_every_spelling():
    expected = {"fc": {"w4": Fraction(1, 10), "w8": Fraction(12)}}
    assert read_latency_table('{"fc": {"w4": 0.1, "w8-channel": 12}}', "json") == expected
    rows = '[{"layer":"fc","scheme":"w4","latency_ns":0.1},{"layer":"fc","scheme":"w8","latency_ns":12}]'
    assert read_latency_table(rows, "json") == expected
    assert read_latency_table("layer, scheme, latency_ns\nfc, w4, 0.1\nfc, w8, 12\n", "csv") == expected
    assert latency_from_mapping({"fc": {"w4": 0.1, "w8": 12}}) == expected


def test_missing_cells_are_named():
    table = latency_from_mapping({"fc": {"w4": 1}})
    with pytest.raises(CostError, match=r"none for fc x w8, other x w4, other x w8 \(3 missing\)"):
        resources([layer(), layer("other")], parse_schemes("w4,w8"), table)


def test_an_alias_names_the_layer_too():
    table = latency_from_mapping({"head": {"w4": 7}})
    grids = resources([layer("embed", aliases=("head",))], parse_schemes("w4"), table)
    assert grids["latency_ns"] == ((Fraction(7),),)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", "json", "must be JSON"),
        ("3", "json", "an object of layers or a list of rows"),
        ('{"fc": 3}', "json", "must be an object of numbers by scheme"),
        ('{"fc": {"w99": 3}}', "json", "cannot be read: Weight bits must be 2 to 8"),
        ('{"fc": {"w4": -3}}', "json", "0 or more. Got '-3'"),
        ('{"fc": {"w4": NaN}}', "json", "0 or more. Got 'NaN'"),
        ('{"fc": {"w4": 1e999999999}}', "json", "0 or more"),
        ('{"fc": {"w4": true}}', "json", "0 or more"),
        ('{"fc": {"w4": null}}', "json", "0 or more"),
        ('{"fc": {"w4": 1, "w4-sym": 2}}', "json", "fc x w4 twice"),
        ('{"fc": {"w4": 1, "w4": 2}}', "json", "'w4' twice"),
        ('{"": {"w4": 1}}', "json", "must be a name"),
        ("{}", "json", "at least one row"),
        ('[{"layer": "fc"}]', "json", "Cost row 0 must have the fields"),
        ("a,b\n1,2\n", "csv", "must start with the header layer,scheme,latency_ns"),
        ("", "csv", "must start with the header"),
        ("layer,scheme,latency_ns\nfc,w4\n", "csv", "3 cells in every row.*line 2"),
        ("layer,scheme,latency_ns\nfc,w4,1,2\n", "csv", "3 cells in every row"),
        ("layer,scheme,latency_ns\nfc,w4,fast\n", "csv", "Got 'fast'"),
    ],
)
def test_a_bad_table_says_where(text, kind, message):
    with pytest.raises(CostError, match=message):
        read_latency_table(text, kind)
