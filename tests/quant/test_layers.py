import json
from dataclasses import replace

import pytest

from quant.layers import Excluded, Inventory, Layer
from quant.reading import Node, ReadError

LAYER = Layer("conv", "conv2d", (8, 3, 3, 3), (8, 27), 216, None, "convolution", ("again",), "bfloat16")
EMBED = Excluded("embed", "embedding", 640, "left out", ("lm_head",))
INVENTORY = Inventory((LAYER,), (EMBED,), 900, 1234)


def test_inventory_survives_json():
    assert Inventory.from_json(json.loads(json.dumps(INVENTORY.as_json()))) == INVENTORY


def test_documents_from_before_excluded_weights_had_aliases_are_read():
    document = json.loads(json.dumps(INVENTORY.as_json()))
    del document["excluded"][0]["aliases"]
    assert Inventory.from_json(document).excluded == (replace(EMBED, aliases=()),)


def test_documents_from_before_attention_was_told_apart_are_read():
    document = json.loads(json.dumps(INVENTORY.as_json()))
    document["layers"][0]["role"] = "attention"
    assert Inventory.from_json(document).layers[0].role == "self_attention"


def test_layers_are_found_by_every_name():
    assert INVENTORY.by_name == {"conv": LAYER, "again": LAYER}
    assert LAYER.stored_bytes == 432
    assert INVENTORY.parameters == 216


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("op", "conv9d", "/layers/0/op must be one of linear"),
        ("role", "hero", "/layers/0/role must be one of"),
        ("dtype", "int8", "/layers/0/dtype must be one of"),
        ("parameters", 0, "/layers/0/parameters must be an integer of at least 1. Got 0"),
        ("matrix", [1, 2, 3], "/layers/0/matrix must be two integers"),
    ],
)
def test_a_bad_layer_is_named_by_place(field, value, message):
    document = INVENTORY.as_json()
    document["layers"][0][field] = value
    with pytest.raises(ReadError, match=message):
        Inventory.from_json(document)


def test_nodes_say_what_they_must_be():
    with pytest.raises(ReadError, match="/ must be an object. Got 3"):
        Node(3).mapping()
    with pytest.raises(ReadError, match="/a~1b/b must be given"):
        Node({"a/b": {}}).member("a/b").fields("b")
    with pytest.raises(ReadError, match="must be a number. Got True"):
        Node(True).number()
    with pytest.raises(ReadError, match="must be a text"):
        Node(1).optional_text()
