from __future__ import annotations

import pytest

from quant.costs import CostError
from quant.deployment import Deployment, deployment_resources
from quant.geometry import Geometry
from quant.layers import Excluded, Inventory, Layer
from quant.schemes import parse_schemes

MENU = parse_schemes("w4,w4-g128,w8")
GEOMETRY = Geometry(cached=32, windows=(None, None), experts=4, active=1, hidden=16)


def layer(name, op="linear", role="other", aliases=()):
    return Layer(name, op, (32, 16), (32, 16), 512, None, role, aliases, "float16")


@pytest.fixture
def inventory():
    embedding = Excluded("embed", "embedding", 100 * 16, "embedding: left out by default")
    layers = (layer("b.0.q_proj"), layer("b.0.experts.3.w1"))
    return Inventory(layers, (embedding,), 2 * 512 + 1600, 1600 * 2 + 40)


def sums(grid, column):
    return sum(row[column] for row in grid)


def test_sums_over_layers_are_the_whole(inventory):
    grids = deployment_resources(inventory, MENU, Deployment(100, 3), GEOMETRY)
    stored = 2 * (512 // 2 + 32 * 2)
    cache = 32 * 2 * 100 * 3 * 2
    assert sums(grids["checkpoint_bytes"], 0) == stored + inventory.other_bytes
    assert sums(grids["kv_cache_bytes"], 0) == cache
    assert sums(grids["memory_bytes"], 0) == stored + inventory.other_bytes + cache


def test_a_step_reads_its_share_of_experts_and_one_row_per_token(inventory):
    grids = deployment_resources(inventory, MENU, Deployment(100, 1), GEOMETRY)
    linear = 512 // 2 + 32 * 2
    cache = 32 * 2 * 100 * 2
    assert sums(grids["active_bytes"], 0) == linear + linear // 4 + 40 + 16 * 2 + cache
    many = deployment_resources(inventory, MENU, Deployment(100, 1000), GEOMETRY)
    assert sums(many["active_bytes"], 0) == 2 * linear + inventory.other_bytes + 1000 * cache


def test_experts_at_full_precision_are_read_by_their_share():
    fused = Excluded("b.0.experts.gate_up_proj", "experts", 4 * 512, "excluded")
    found = Inventory((layer("b.0.q_proj"),), (fused,), 512 + 4 * 512, 4 * 512 * 2)
    planned = Layer(
        "b.0.experts.gate_up_proj", "experts", (4, 32, 16), (128, 16), 2048, None, "other", (), "float16"
    )
    geometry = Geometry(0, (), experts=4, active=1)
    assert (
        deployment_resources(found, MENU, Deployment(1, 1), geometry)["active_bytes"][0][0] == 320 + 512 * 2
    )
    inside = Inventory((planned,), (), 2048, 0)
    assert (
        deployment_resources(inside, MENU, Deployment(1, 1), geometry)["active_bytes"][0][0] == 4 * 320 // 4
    )


def test_a_quantized_embedding_is_read_by_rows():
    table = layer("embed", "embedding", "embedding")
    inventory = Inventory((table,), (), 512, 0)
    grids = deployment_resources(inventory, MENU, Deployment(1, 1), Geometry(0, ()))
    assert grids["active_bytes"][0][2] == (512 + 64) // 32
    tied = Inventory((layer("embed", "embedding", "embedding", ("lm_head",)),), (), 512, 0)
    assert deployment_resources(tied, MENU, Deployment(1, 1), Geometry(0, ()))["active_bytes"][0][2] == 576


def test_what_cannot_be_served_is_refused(inventory):
    with pytest.raises(CostError, match="configuration names its attention layers"):
        deployment_resources(inventory, MENU, Deployment(), None)
    with pytest.raises(CostError, match=r"key-value cache must be one of.*Got 'fp3'"):
        Deployment(kv_cache="fp3")
